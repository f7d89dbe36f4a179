"""Operators that communicate: bytes sent, floating operations, what is saved, what is refused.

No other process is needed: groups of four and eight ranks that move nothing.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ms_ops
from ms_ops import comm, opdef, registry
from ms_ops.testing.cases.comm import OPERATORS
from support.fake import fake_world

M, K, N = 8, 12, 16  # rows, inner and outer width on this rank
E, C = 8, 16  # experts, and rows for each that a rank holds


class Wire(TorchDispatchMode):
    """Counts the bytes that a rank sends when collectives run over a ring.

    Our operators are run by the portable backend under the same count.
    """

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func._opname
        if func.namespace == opdef.NAMESPACE:
            name = op if op in opdef.OPERATORS else op.removesuffix("_backward")
            kernel = registry.kernel(name, "portable")
            with self:
                run = kernel.forward if op == name else kernel.backward
                return run(*args[:-1])
        if func.namespace == "_c10d_functional" and op != "wait_tensor":
            self.sent[op.removesuffix("_")] += self.ring(op.removesuffix("_"), args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def ring(op, args):
        bytes_, ranks = (
            args[0].nbytes,
            dist.distributed_c10d._resolve_process_group(args[-1]).size(),
        )
        parts = {
            "all_gather_into_tensor": (ranks - 1) * ranks,
            "reduce_scatter_tensor": ranks - 1,
            "all_to_all_single": ranks - 1,
            "all_reduce": 2 * (ranks - 1),
        }
        assert bytes_ * parts[op] % ranks == 0
        return bytes_ * parts[op] // ranks


@pytest.fixture(params=[(4, 2), (8, 4)], ids=["4ranks", "8ranks"])
def world(request):
    """(size, inner): the group of all ranks, one of `inner` ranks, and one across."""
    size, inner = request.param
    with fake_world(size):
        yield size, inner, size // inner


def make(*shape):
    return torch.randn(*shape).bfloat16().requires_grad_()


def pair(size, inner):
    return dist.new_group(list(range(inner))), dist.new_group(list(range(0, size, inner)))


def calls(size, inner, outer):
    """name: (call, arguments, bytes sent forward, backward), in elements of 2 bytes."""
    all_ = dist.group.WORLD
    g1, g2 = pair(size, inner)
    a, b, bias = make(M, K), make(K, N), make(N)
    shard = make(E, C, K)
    mine = make(E // outer, K * inner, N)
    rows = make(E // outer, outer * C, N)
    w = make(E // outer, N, K * inner)
    reduced = 2 * (size - 1) * M * N // size
    scattered = (size - 1) * M * N // size
    sides = (inner - 1) * E * C * K + (outer - 1) * E * C * K // outer
    again = (size - 1) * M * K
    grid = (inner - 1) * M * K, (outer - 1) * inner * M * N // outer
    return {
        "matmul_all_reduce": (
            lambda: comm.matmul_all_reduce(a, b, all_, bias=bias), (a, b, bias), reduced, 0),
        "all_gather_matmul": (
            lambda: comm.all_gather_matmul(a, b, all_, bias=bias), (a, b, bias),
            again, again + (size - 1) * M * K),
        "all_gather_matmul saved": (
            lambda: comm.all_gather_matmul(a, b, all_, save_gathered=True), (a, b),
            again, (size - 1) * M * K),
        "all_gather_matmul frozen": (
            lambda: comm.all_gather_matmul(a, b.detach(), all_), (a,),
            again, (size - 1) * M * K),
        "matmul_reduce_scatter": (
            lambda: comm.matmul_reduce_scatter(a, b, all_, bias=bias), (a, b, bias),
            scattered, scattered),
        "all_gather_matmul_reduce_scatter": (
            lambda: comm.all_gather_matmul_reduce_scatter(a, b, g1, g2, bias=bias), (a, b, bias),
            sum(grid), sum(grid) + grid[0]),
        "matmul_all_reduce_add_rms_norm": (
            lambda: comm.matmul_all_reduce_add_rms_norm(a, b, make(M, N), bias, all_)[1],
            (a, b), reduced, 0),
        "grouped_matmul_all_reduce": (
            lambda: comm.grouped_matmul_all_reduce(a, make(2, K, N), all_, [3, M]), (a,),
            reduced, 0),
        "alltoall_allgather_bmm": (
            lambda: comm.alltoall_allgather_bmm(shard, mine, g2, g1), (shard, mine), sides, sides),
        "alltoall_allgather_bmm again": (
            lambda: comm.alltoall_allgather_bmm(shard, mine, g2, g1, save_gathered=False),
            (shard, mine), sides, 2 * sides),
        "bmm_reducescatter_alltoall": (
            lambda: comm.bmm_reducescatter_alltoall(rows, w, g2, g1), (rows, w), sides, sides),
    }  # fmt: skip


def test_bytes_sent(world):
    table = calls(*world)
    assert {name.split()[0] for name in table} >= OPERATORS.keys() - {
        "matmul_all_reduce_add_rms_norm_"  # the same product, forward only
    }
    for name, (call, leaves, forward, backward) in table.items():
        with Wire() as there:
            y = call()
        with Wire() as back:
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert (there.sent.total(), back.sent.total()) == (2 * forward, 2 * backward), name


def test_one_collective_for_each_step(world):
    call, leaves, *_ = calls(*world)["alltoall_allgather_bmm"]
    calls_made = []

    class Names(Wire):
        @staticmethod
        def ring(op, args):
            calls_made.append(op)
            return 0

    with Names():
        y = call()
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    there = ["all_to_all_single", "all_gather_into_tensor"]
    assert calls_made == [*there, "reduce_scatter_tensor", "all_to_all_single"]


def test_flop_formulas_count_what_is_multiplied(world):
    ms_ops.register_flop_formulas()
    for name, (call, leaves, *_) in calls(*world).items():
        with FlopCounterMode(display=False) as stated:
            y = call()
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        with FlopCounterMode(display=False) as counted, Wire():
            y = call()
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert stated.get_total_flops() == counted.get_total_flops() > 0, name


def saved(call):
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(storages.values())


def test_saved_bytes(world):
    size, inner, outer = world
    all_ = dist.group.WORLD
    a, b, residual, gamma = make(M, K), make(K, N), make(M, N), make(N)
    assert saved(lambda: comm.all_gather_matmul(a, b, all_)) == 2 * (M * K + K * N)
    kept = saved(lambda: comm.all_gather_matmul(a, b, all_, save_gathered=True))
    assert kept == 2 * (size * M * K + K * N)
    assert saved(lambda: comm.matmul_reduce_scatter(a, b.detach(), all_)) == 2 * K * N
    assert saved(lambda: comm.matmul_reduce_scatter(a.detach(), b, all_)) == 2 * M * K
    normed = saved(lambda: comm.matmul_all_reduce_add_rms_norm(a, b, residual, gamma, all_)[1])
    assert normed == 2 * (M * K + K * N + N + M * N) + 4 * M
    g1, g2 = pair(size, inner)
    shard, mine = make(E, C, K), make(E // outer, K * inner, N)
    whole = E // outer * outer * C * K * inner
    call = comm.alltoall_allgather_bmm
    assert saved(lambda: call(shard, mine, g2, g1)) == 2 * (whole + mine.numel())
    again = saved(lambda: call(shard, mine, g2, g1, save_gathered=False))
    assert again == 2 * (shard.numel() + mine.numel())
    active = saved(lambda: call(shard, mine, g2, g1, activation="silu"))
    assert active == 2 * (whole + mine.numel() + E // outer * outer * C * N)


def test_autocast_casts_the_factors():
    with fake_world(2):
        a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = comm.matmul_all_reduce(a, b, dist.group.WORLD)
            z = comm.alltoall_allgather_bmm(
                a.view(2, 2, 6), b.unsqueeze(0), dist.group.WORLD, dist.new_group([0])
            )
        assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
        y.sum().backward()
        assert a.grad.dtype is torch.float32


def test_explain_names_the_backends():
    with fake_world(2):
        a = torch.randn(4, 4)
        lines = ms_ops.explain("matmul_all_reduce", a, a, dist.group.WORLD).splitlines()
    assert "portable (priority 90): can serve" in lines


def two():
    return dist.new_group([0, 1]), dist.new_group([0, 2])


def refusals():
    """(name, call(group, g1, g2), kind, part of the message)."""
    x, w, low = torch.randn(8, 4), torch.randn(4, 6), torch.randn(4, 6).bfloat16()
    residual, gamma = torch.randn(8, 6), torch.randn(6)
    rows, experts = torch.randn(8, 4, 2), torch.randn(4, 4, 6)
    inside = torch.randn(4, 8, 6)
    back = experts.transpose(1, 2)
    norm, norm_ = comm.matmul_all_reduce_add_rms_norm, comm.matmul_all_reduce_add_rms_norm_
    send, home = comm.alltoall_allgather_bmm, comm.bmm_reducescatter_alltoall
    reduce, scatter = comm.matmul_all_reduce, comm.matmul_reduce_scatter
    grid, grouped = comm.all_gather_matmul_reduce_scatter, comm.grouped_matmul_all_reduce
    memory = torch.randn(96)
    inner, outer = memory[:32].view(8, 4), memory[31:79].view(8, 6)
    return [
        ("no_tensor", lambda g, *_: reduce(1, w, g), TypeError, "a: got int"),
        ("integers", lambda g, *_: reduce(x.int(), w, g), TypeError, "a: got torch.int32"),
        ("dtypes", lambda g, *_: reduce(x, low, g), TypeError, "b: got torch.bfloat16"),
        ("vector", lambda g, *_: reduce(x[0], w, g), ValueError, "a: got 1 dimensions"),
        ("matrix", lambda g, *_: scatter(x, w[None], g), ValueError, "b: got 3 dimensions"),
        ("inner", lambda g, *_: reduce(x, w.t(), g), ValueError, "4 in dimension 0"),
        ("transposed", lambda g, *_: reduce(x, w, g, transpose_b=True), ValueError,
         "4 in dimension 1"),
        ("bias_shape", lambda g, *_: reduce(x, w, g, bias=x), ValueError, "need (6,)"),
        ("bias_dtype", lambda g, *_: reduce(x, w, g, bias=gamma.half()), TypeError, "bias: got"),
        ("group_name", lambda g, *_: reduce(x, w, g.group_name), TypeError, "group: got str"),
        ("no_member", lambda g, *_: reduce(x, w, dist.GroupMember.NON_GROUP_MEMBER), TypeError,
         "with this rank in it"),
        ("rows", lambda g, *_: scatter(x[:7], w, g), ValueError, "multiple of the 4 ranks"),
        ("devices", lambda g, *_: reduce(x, w.to("meta"), g), RuntimeError, "device: got"),
        ("one_group", lambda g, *_: grid(x, w, g, g), ValueError, "scatter_group: got the group"),
        ("residual", lambda g, *_: norm(x, w, residual[:7], gamma, g), ValueError, "residual: got"),
        ("residual_dtype", lambda g, *_: norm(x, w, residual.half(), gamma, g), TypeError,
         "residual: got torch.float16"),
        ("gamma", lambda g, *_: norm(x, w, residual, gamma[:5], g), ValueError, "gamma: got (5,)"),
        ("gamma_dtype", lambda g, *_: norm(x, w, residual, gamma.half(), g), TypeError, "gamma:"),
        ("eps", lambda g, *_: norm(x, w, residual, gamma, g, eps=-1), ValueError, "eps: got -1"),
        ("strided", lambda g, *_: norm_(x, w, residual.t().contiguous().t(), gamma, g), ValueError,
         "not contiguous"),
        ("gradient", lambda g, *_: norm_(x, w, residual.clone().requires_grad_(), gamma, g),
         ValueError, "require gradients"),
        ("overlap", lambda g, *_: norm_(inner, w, outer, gamma, g), ValueError, "memory that x"),
        ("groups", lambda g, *_: grouped(x, w[None], g, [7]), ValueError, "end at row 7"),
        ("experts", lambda _, *g: send(rows[:7], experts, *g), ValueError, "x: got 7 experts"),
        ("hidden", lambda _, *g: send(rows, experts[:, :3], *g), ValueError, "4 in dimension 1"),
        ("act", lambda _, *g: send(rows, experts, *g, activation="tanh"), ValueError, "activation"),
        ("shard", lambda _, *g: send(rows, experts, *g, shard=0), ValueError, "shard: got 0"),
        ("flat", lambda _, *g: send(rows[0], experts, *g), ValueError, "x: got 2 dimensions"),
        ("same", lambda _, g, __: send(rows, experts, g, g), ValueError, "tp_group: got the group"),
        ("send_bias", lambda _, *g: send(rows, experts, *g, bias=gamma), ValueError, "bias: got"),
        ("home_rows", lambda _, *g: home(inside[:, :7], back, *g), ValueError, "7 rows"),
        ("home_columns", lambda _, *g: home(inside, back[..., :3], *g), ValueError, "3 columns"),
        ("home_inner", lambda _, *g: home(inside, experts, *g), ValueError, "weight: got"),
        ("home_bias", lambda _, *g: home(inside, back, *g, bias=gamma), ValueError, "bias: got"),
    ]  # fmt: skip


def test_refusals():
    with fake_world(4):
        groups = dist.group.WORLD, *two()
        for name, call, kind, message in refusals():
            with pytest.raises(kind) as caught:
                call(*groups)
            text = str(caught.value)
            assert text.split(":")[0] in OPERATORS, name
            assert message in text, f"{name}: {text}"


def test_memory_beside_that_of_x_may_be_written():
    memory = torch.randn(80)
    x, residual = memory[:32].view(8, 4), memory[32:].view(8, 6)
    with fake_world(2):
        y, _ = comm.matmul_all_reduce_add_rms_norm_(
            x, torch.randn(4, 6), residual, torch.randn(6), dist.group.WORLD
        )
    assert y.data_ptr() == residual.data_ptr()
