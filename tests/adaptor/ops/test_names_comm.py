"""The operator names of MindSpeed that communicate: signatures, values and gradients, errors."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mindspeed.ops.lcal_functional import CoCOperations, TP2DConfig, coc_ops
from mindspeed.ops.npu_all_to_all_all_gather_bmm import npu_alltoall_allgather_bmm
from mindspeed.ops.npu_bmm_reduce_scatter_all_to_all import npu_bmm_reducescatter_alltoall
from mindspeed.ops.npu_grouped_mat_mul_all_reduce import npu_grouped_mat_mul_all_reduce
from mindspeed.ops.npu_mm_all_reduce_add_rms_norm import npu_mm_all_reduce_add_rms_norm
from mindspeed.ops.npu_mm_all_reduce_add_rms_norm_ import npu_mm_all_reduce_add_rms_norm_
from mindspeed.ops.process_groups import communicator, resolved
from support.fake import fake_world
from support.ranks import run_ranks

NORM = [
    *("x1", "x2", "residual", "gamma", "hcom", "reduce_op", "epsilon", "bias", "antiquant_scale"),
    *("antiquant_offset", "dequant_scale", "antiquant_group_size", "comm_turn"),
]
EXPERTS = ["x", "weight", "group_ep", "group_ep_worldsize", "group_tp", "group_tp_worldsize"]
COC = ["self", "input1", "input2", "output"]
SIGNATURES = {
    npu_mm_all_reduce_add_rms_norm: NORM,
    npu_mm_all_reduce_add_rms_norm_: NORM,
    npu_grouped_mat_mul_all_reduce: [
        *("x", "weight", "hcomm", "bias", "group_list", "split_item", "reduce_op", "comm_turn")
    ],
    npu_alltoall_allgather_bmm: [
        *EXPERTS,
        *("bias", "shard_type", "act_type", "need_allgather_out", "need_activation_feature"),
    ],
    npu_bmm_reducescatter_alltoall: [*EXPERTS, "bias", "shard_type"],
    CoCOperations.matmul_all_reduce: [*COC, "bias"],
    CoCOperations.all_gather_matmul: [*COC, "bias"],
    CoCOperations.all_gather_matmul_v2: [*COC, "comm_output", "bias"],
    CoCOperations.matmul_reduce_scatter: [*COC, "bias"],
    CoCOperations.pure_matmul: [*COC, "bias"],
    CoCOperations.all_gather_matmul_reduce_scatter: [*COC, "tp2d_config", "bias"],
    TP2DConfig: ["ag_dim", "rs_dim", "inner_dim_is_ag"],
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signatures(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


def tensors(rank, *shapes):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def check_norm(rank, size):
    parts = [tensors(r, (6, 5), (5, 8), (8,)) for r in range(size)]
    residual, gamma = tensors(99, (6, 8), (8,))
    y = sum(x @ w + b for x, w, b in parts) + residual
    normed = torch.nn.functional.rms_norm(y, (8,), gamma, 1e-5)
    x, w, bias = (t.requires_grad_() for t in parts[rank])
    name = dist.group.WORLD.group_name
    got = npu_mm_all_reduce_add_rms_norm(x, w, residual, gamma, name, "sum", 1e-5, bias)
    same(got, (y, normed))
    (dx, dbias) = torch.autograd.grad(got[0], (x, bias), torch.ones_like(y))
    same(dx, torch.ones_like(y) @ w.t())
    same(dbias, torch.full_like(bias, 6.0))
    with torch.no_grad():
        group = dist.group.WORLD
        out = npu_mm_all_reduce_add_rms_norm_(x, w, residual, gamma, group, bias=bias, epsilon=1e-5)
    assert out[0] is residual
    same(out, (y, normed))


def check_eight_bit_weights(rank, size):
    x, scale, offset = (t.bfloat16() for t in tensors(rank, (3, 70), (3, 4), (3, 4)))
    weight = torch.arange(280).view(70, 4).remainder(17).char()
    residual, gamma = torch.zeros(3, 4).bfloat16(), torch.ones(4).bfloat16()
    spread = [t.repeat_interleave(32, 0)[:70] for t in (scale.float(), offset.float())]
    plain = ((weight + spread[1]) * spread[0]).bfloat16()
    quantised = {"antiquant_scale": scale, "antiquant_offset": offset, "antiquant_group_size": 32}
    args = (residual, gamma, dist.group.WORLD)
    want = npu_mm_all_reduce_add_rms_norm(x, plain, *args)
    assert torch.equal(npu_mm_all_reduce_add_rms_norm(x, weight, *args, **quantised)[0], want[0])


def check_grouped(rank, size):
    parts = [tensors(r, (7, 5), (2, 5, 3), (2, 3)) for r in range(size)]
    ends = (slice(0, 4), slice(4, 7))
    want = [sum(x[e] @ w[i] + b[i] for x, w, b in parts) for i, e in enumerate(ends)]
    x, w, b = parts[rank]
    x.requires_grad_()
    group, call = dist.group.WORLD, npu_grouped_mat_mul_all_reduce
    pairs, matrices, bias = [x[e] for e in ends], list(w), list(b)
    same(call(pairs, matrices, group, bias=bias), want)
    same(call([x], matrices, group, bias=bias, group_list=[4, 7], split_item=1), want)
    same(call(pairs, matrices, group, bias=bias, split_item=2), [torch.cat(want)])
    (y,) = call([x], [w], group.group_name, bias=bias, group_list=[4, 7], split_item=3)
    same(y, torch.cat(want))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    same(dx[:4], torch.ones(4, 3).double() @ w[0].t())


def check_coc(rank, size):
    parts = [tensors(r, (8, 5), (5, 3), (1, 3)) for r in range(size)]
    a, b, bias = parts[rank]
    bias = parts[0][2]
    total = sum(x @ w for x, w, _ in parts)
    rows = torch.cat([x for x, *_ in parts])
    coc_ops.use(dist.group.WORLD)
    same(coc_ops.matmul_all_reduce(a, b, torch.empty_like(total), bias), total + bias)
    same(coc_ops.matmul_all_reduce(a, b.t().contiguous(), torch.empty_like(total)), total)
    own = total.chunk(size)[rank]
    same(coc_ops.matmul_reduce_scatter(a, b, torch.empty_like(own), bias), own + bias)
    want = rows @ b + bias
    same(coc_ops.all_gather_matmul(a, b, torch.empty_like(want), bias), want)
    gathered = torch.empty_like(rows)
    same(coc_ops.all_gather_matmul_v2(a, b, torch.empty_like(want), gathered, bias)[0], want)
    assert torch.equal(gathered, rows)
    same(coc_ops.pure_matmul(a, b, torch.empty_like(total), bias), a @ b + bias)
    for inner_gathers in (True, False):
        config = TP2DConfig(2, 2, inner_gathers)
        near, far = rank % 2, rank // 2
        mine, other = (near, far) if inner_gathers else (far, near)
        products = [
            torch.cat([parts[_at(g, s, inner_gathers)][0] for g in range(2)])
            @ parts[_at(mine, s, inner_gathers)][1]
            for s in range(2)
        ]
        part = sum(products).chunk(2)[other]
        y = coc_ops.all_gather_matmul_reduce_scatter(a, b, torch.empty_like(part), config, bias)
        same(y, part + bias)
    with pytest.raises(ValueError, match="tp2d_config: got a grid of 2 times 3"):
        coc_ops.all_gather_matmul_reduce_scatter(a, b, a, TP2DConfig(2, 3, True))
    with pytest.raises(ValueError, match="coc_ops: output: got"):
        coc_ops.pure_matmul(a, b, a)
    coc_ops.use(None)


def _at(gather, scatter, inner_gathers):
    return scatter * 2 + gather if inner_gathers else gather * 2 + scatter


def check_experts(rank, size):
    """Rows sent to experts and back: shard 0 and 1, consecutive ranks split the hidden size."""
    tps = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    eps = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    tp, ep = tps[rank // 2], eps[rank % 2]
    for shard in (0, 1):
        dim = 1 if shard else 2
        shapes = ((4, 6, 8), (2, 8, 3), (2, 1, 3))
        whole = [tensors(source, shapes[0])[0] for source in range(2)]
        x = whole[rank // 2].chunk(2, dim)[rank % 2]
        _, weight, bias = tensors(10 + rank, *shapes)
        rows = torch.cat([w[rank // 2 * 2 :][:2] for w in whole], 1)
        z = rows @ weight + bias
        y, gathered, product = npu_alltoall_allgather_bmm(
            x, weight, ep, 2, tp.group_name, 2, bias=bias, shard_type=shard, act_type="SiLu",
            need_allgather_out=True, need_activation_feature=True,
        )  # fmt: skip
        same((y, gathered, product), (torch.nn.functional.silu(z), rows, z))
        plain = npu_alltoall_allgather_bmm(x, weight, ep, 2, tp, 2, shard_type=shard)
        same(plain, (rows @ weight, None, None))
        eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
        half = eye.chunk(2, 1)[rank % 2]
        shift = torch.ones(2, 1, 8 if shard else 4, dtype=torch.float64)
        part = gathered.chunk(2, 2)[rank % 2]
        back = npu_bmm_reducescatter_alltoall(
            part, half, ep, 2, tp, 2, bias=shift, shard_type=shard
        )
        same(back, x + 1)


def everything(rank, size):
    for check in (check_norm, check_eight_bit_weights, check_grouped, check_coc, check_experts):
        check(rank, size)


def test_values_and_gradients_at_four_ranks():
    run_ranks(everything, 4)


def refusals(group):
    x, w, residual, gamma = torch.ones(6, 64), torch.ones(64, 8), torch.ones(6, 8), torch.ones(8)
    low = (x.half(), w.char(), residual.half(), gamma.half())
    rows, experts = torch.ones(4, 2, 3), torch.ones(2, 3, 5)
    norm, lists = npu_mm_all_reduce_add_rms_norm, npu_grouped_mat_mul_all_reduce
    send, home = npu_alltoall_allgather_bmm, npu_bmm_reducescatter_alltoall
    other = dist.new_group([0, 1])
    half, whole = torch.ones(8).half(), torch.ones(2, 8).half()
    return [
        (lambda: norm(x, w, residual, gamma, "no such"), "hcom: got 'no such'"),
        (lambda: norm(x, w, residual, gamma, group, "max"), "reduce_op: got 'max'"),
        (lambda: norm(x, w, residual, gamma, group, comm_turn=1), "comm_turn: got 1"),
        (lambda: norm(None, w, residual, gamma, group), "x1: got NoneType"),
        (lambda: norm(x, w, residual, gamma, group, antiquant_scale=gamma), "need none, or x2"),
        (lambda: norm(x, w, residual, gamma, group, dequant_scale=gamma), "dequant_scale: got"),
        (lambda: norm(x.char(), *low[1:], group), "dequant_scale: got 8-bit x1"),
        (lambda: norm(*low, group), "antiquant_scale: got none"),
        (lambda: norm(*low, group, antiquant_scale=gamma), "need torch.float16"),
        (lambda: norm(*low, group, antiquant_scale=half[:3]), "antiquant_scale: got (3,)"),
        (lambda: norm(*low, group, antiquant_scale=whole, antiquant_group_size=33),
         "antiquant_group_size: got 33"),
        (lambda: npu_mm_all_reduce_add_rms_norm_(x, w, gamma, gamma, group), "residual: got"),
        (lambda: lists([x], [w], group, split_item=4), "split_item: got 4"),
        (lambda: lists([x], [w], group, reduce_op="avg"), "reduce_op: got 'avg'"),
        (lambda: lists([x], [w, w], group), "group_list: got None"),
        (lambda: lists([x], [w], group, group_list=[6]), "group_list: got [6]"),
        (lambda: lists([x], [w], group, split_item=1), "group_list: got None"),
        (lambda: lists([x], [w, w], group, group_list=[6], split_item=3), "2 ends that rise to 6"),
        (lambda: lists([x], [w], group, bias=[gamma, gamma]), "bias: got 2 tensors"),
        (lambda: lists([x] * 65, [w] * 65, group), "1 to 64 of each"),
        (lambda: send(rows, experts, group, 2, other, 2), "group_ep_worldsize: got 2"),
        (lambda: send(rows, experts, group, 4, other, 3), "group_tp_worldsize: got 3"),
        (lambda: send(rows, experts, group, 4, other, 2, shard_type=2), "shard_type: got 2"),
        (lambda: send(rows, experts, group, 4, other, 2, act_type="tanh"), "act_type: got 'tanh'"),
        (lambda: home(rows, experts, group, 4, group, 4), "tp_group: got the group of ep_group"),
        (lambda: home(rows, experts, group, 0, other, 2), "group_ep_worldsize: got 0"),
    ]  # fmt: skip


def test_refusals():
    with fake_world(4):
        for number, (call, message) in enumerate(refusals(dist.group.WORLD)):
            with pytest.raises((TypeError, ValueError)) as caught:
                call()
            assert message in str(caught.value), number


def test_a_group_is_found_by_the_name_of_its_communicator():
    asked = []

    def name(rank, init_comm):
        asked.append((rank, init_comm))
        return "10.0.0.1%eth0"

    group = SimpleNamespace(
        _get_backend=lambda device: SimpleNamespace(get_hccl_comm_name=name),
    )
    with fake_world(4, rank=2):
        assert communicator(dist.group.WORLD) is None
        assert communicator(group, torch.device("meta")) == "10.0.0.1%eth0"
        assert resolved("op", "group", dist.group.WORLD.group_name) is dist.group.WORLD
    assert asked == [(2, False)]
