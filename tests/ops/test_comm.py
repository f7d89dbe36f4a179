"""Operators that communicate, at 1, 2 and 4 ranks, against a simulation of all ranks in fp64."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import ms_ops
from ms_ops import comm, opdef
from ms_ops.testing import DTYPES
from ms_ops.testing.cases.comm import OPERATORS
from ms_ops.testing.comm import check_fake_rank, check_ranks, run_rank
from support.comm_ranks import World
from support.mutation import Mutation
from support.ranks import run_ranks

PORTABLE = "ms_ops.fused_comm.portable"


def failures(check, *args):
    """Run a check; return its message, or nothing."""
    try:
        check(*args)
    except AssertionError as error:
        return [str(error)]
    return []


def values(rank, size):
    """Every operator, sample and dtype on the portable backend, fp64 on the reference too."""
    world, wrong = World(rank, size), []
    for dtype in {1: DTYPES[:1], 2: DTYPES, 4: DTYPES[::2]}[size]:
        for test, sample, groups, sizes in world.calls(dtype):
            wrong += failures(check_ranks, test, sample, groups, sizes, rank, "portable")
            if dtype is torch.float64:
                wrong += failures(check_ranks, test, sample, groups, sizes, rank, "reference")
            if dtype is torch.bfloat16 and size == 2:
                for backend in ("portable", "reference"):
                    wrong += failures(check_fake_rank, test, sample, groups, rank, backend)
    return wrong


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_gradients_and_fakes(size):
    assert run_ranks(values, size, timeout=120) == [[]] * size


GATHER, SCATTER = "start_gather(a, gather, gather_size)()", "start_scatter(y, group, size)()"
SUM = "sum_ranks(y, group)"
MUTANTS = [
    *[
        (op, Mutation(*parts))
        for op, *parts in (
            ("matmul_all_reduce", "missing reduce", f"{PORTABLE}:_reduced", SUM, "y"),
            ("matmul_all_reduce", "doubled reduce", f"{PORTABLE}:_reduced", SUM,
             "sum_ranks(sum_ranks(y, group), group)"),
            ("matmul_all_reduce", "bias on each rank", f"{PORTABLE}:product",
             "add_bias(_reduced(rows @ matrix, reduce, reduce_size, scatter), bias)",
             "_reduced(add_bias(rows @ matrix, bias), reduce, reduce_size, scatter)"),
            ("matmul_all_reduce", "gradient summed over the ranks", f"{PORTABLE}:product_backward",
             "if scatter else dy", "if scatter else sum_ranks(dy.clone(), reduce)"),
            ("all_gather_matmul", "shards in another order", f"{PORTABLE}:product",
             GATHER, f"{GATHER}.unflatten(0, (gather_size, a.shape[0])).flip(0).flatten(0, 1)"),
            ("all_gather_matmul", "transposition guessed", f"{PORTABLE}:product",
             "b.t() if transposed", "b.t() if a.shape[1] != b.shape[0]"),
            ("all_gather_matmul", "gradient averaged", f"{PORTABLE}:product_backward",
             "start_scatter(product,", "start_scatter(product / gather_size,"),
            ("all_gather_matmul", "gathered rows' gradient lost", f"{PORTABLE}:product_backward",
             "if dkept is None", "if True"),
            ("all_gather_matmul", "bias gradient over columns", f"{PORTABLE}:column_sums",
             "dy.sum(0,", "dy.sum(1,"),
            ("matmul_reduce_scatter", "rows of another rank", f"{PORTABLE}:_reduced",
             SCATTER, "start_scatter(y.flip(0), group, size)()"),
            ("matmul_reduce_scatter", "bias on each rank", f"{PORTABLE}:product",
             "add_bias(_reduced(rows @ matrix, reduce, reduce_size, scatter), bias)",
             "_reduced(add_bias(rows @ matrix, bias), reduce, reduce_size, scatter)"),
            ("matmul_reduce_scatter", "bias gradient of own rows", f"{PORTABLE}:product_backward",
             "column_sums(grad,", "column_sums(dy,"),
            ("all_gather_matmul_reduce_scatter", "sum over the wrong group",
             f"{PORTABLE}:product_backward",
             "start_scatter(product, gather, gather_size)",
             "start_scatter(product, reduce, reduce_size)"),
            ("matmul_all_reduce_add_rms_norm", "residual in the sum", f"{PORTABLE}:add_norm",
             "sum_ranks(x @", "sum_ranks(residual + x @"),
            ("matmul_all_reduce_add_rms_norm", "gradient of y lost",
             f"{PORTABLE}:add_norm_backward", "wide += dy", "pass"),
            ("matmul_all_reduce_add_rms_norm_", "residual not written",
             "ms_ops.fused_comm.add_norm:in_place", "residual.copy_(y)", "pass"),
            ("grouped_matmul_all_reduce", "missing reduce", f"{PORTABLE}:grouped",
             "y = sum_ranks(", "y = (lambda y, _: y)("),
            ("grouped_matmul_all_reduce", "bias of the next group", f"{PORTABLE}:add_group_bias",
             "right=True", "right=False"),
            ("alltoall_allgather_bmm", "groups exchanged", f"{PORTABLE}:_gather_experts",
             "exchange(x, ep, ep_size), tp, tp_size", "exchange(x, tp, tp_size), ep, ep_size"),
            ("alltoall_allgather_bmm", "rows in order tp, ep", "ms_ops.fused_comm.layout:"
             "gathered_rows", "permute(2, 1, 0, 3, 4)", "permute(2, 0, 1, 3, 4)"),
            ("alltoall_allgather_bmm", "activation not derived", f"{PORTABLE}:dispatch_backward",
             'if activation == "none"', "if True"),
            ("alltoall_allgather_bmm", "bias gradient over columns",
             f"{PORTABLE}:dispatch_backward", "grad.sum(1,", "grad.sum(2,"),
            ("bmm_reducescatter_alltoall", "bias in the gradient", f"{PORTABLE}:combine_backward",
             "dx = torch.bmm(grad, weight.transpose(1, 2))",
             "dx = torch.bmm(grad, weight.transpose(1, 2)) + 0.1"),
            ("bmm_reducescatter_alltoall", "bias gradient over columns",
             f"{PORTABLE}:combine_backward", ".sum(1,", ".sum(2,", 2),
            ("bmm_reducescatter_alltoall", "bias gradient of own rows",
             f"{PORTABLE}:combine_backward", "if with_bias and by_rows:", "if False:"),
            ("bmm_reducescatter_alltoall", "bias before the sum", f"{PORTABLE}:combine",
             "torch.bmm(x, weight), bias,",
             "torch.bmm(x, weight) + (bias.unsqueeze(1) if by_rows and bias is not None else 0), "
             "None if by_rows else bias,"),
        )
    ]
]  # fmt: skip


# These tell the mutants.
ENOUGH = {"bias", "returned", "leading_transposed", "hidden_all_returned", "hidden", "capacity"}


def mutants(rank, size):
    """Which wrong kernels some sample tells from the right ones on this rank."""
    world, caught = World(rank, size), []
    for op, mutation in MUTANTS:
        test = OPERATORS[op]
        sizes, groups = world.of(test)[-1]
        seen = False
        with mutation.applied():
            # All ranks run all samples: who stops alone leaves the others waiting.
            for sample in test.samples(sizes, torch.float64, "cpu"):
                if sample.name not in ENOUGH:
                    continue
                try:
                    check_ranks(test, sample, groups, sizes, rank, "portable")
                except (AssertionError, RuntimeError):
                    seen = True
        caught.append(seen)
    return caught


def test_wrong_kernels_are_caught():
    seen = [any(ranks) for ranks in zip(*run_ranks(mutants, 4, timeout=120), strict=True)]
    missed = [f"{op}: {m.name}" for (op, m), found in zip(MUTANTS, seen, strict=True) if not found]
    assert missed == []


def block(x, w1, w2, w3, gamma, experts, group, alone):
    """A layer of all operators: gathered, scattered, summed and normalised, sent to experts."""
    wide = comm.all_gather_matmul(x, w1, group, transpose_b=True).relu()
    own = comm.matmul_reduce_scatter(wide, w2, group)
    summed = comm.matmul_all_reduce(own, w3, group)
    y, normed = comm.matmul_all_reduce_add_rms_norm(own, w3, summed, gamma, group)
    rows = y.view(4, -1, y.shape[1])
    inside = comm.alltoall_allgather_bmm(rows, experts, group, alone, activation="silu")
    back = comm.bmm_reducescatter_alltoall(inside, experts.transpose(1, 2), group, alone)
    return normed.sum() + back.square().sum()


def pair(x, w1, w2, group):
    """Two operators whose sizes change from call to call."""
    wide = comm.all_gather_matmul(x, w1, group, transpose_b=True)
    return comm.matmul_reduce_scatter(wide, w2, group)


def resized(tensors, group):
    """What is wrong with one graph for all numbers of rows."""
    torch._dynamo.reset()
    counter, wrong = CompileCounterWithBackend("aot_eager"), []
    traced = torch.compile(pair, fullgraph=True, dynamic=True, backend=counter)
    for repeats in (2, 3):
        args = (tensors[0].detach().repeat(repeats, 1), *tensors[1:3], group)
        if not torch.allclose(traced(*args), pair(*args), atol=1e-5):
            wrong.append(f"{repeats} times the rows: another result")
    return wrong + ["compiled again"] * (counter.frame_count - 1)


def compiled(rank, size):
    """One graph of everything, forward and backward: its nodes, and how far it is from eager."""
    generator = torch.Generator().manual_seed(rank)
    alone = [torch.distributed.new_group([r]) for r in range(size)][rank]
    shapes = ((8, 6), (5, 6), (5, 6), (6, 6), (6,), (4 // size, 6, 3))
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    group, graphs = torch.distributed.group.WORLD, []

    def keep(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    traced = torch.compile(block, fullgraph=True, backend=backend)
    losses = [f(*tensors, group, alone) for f in (block, traced)]
    grads = [torch.autograd.grad(loss, tensors) for loss in losses]
    far = [(a - b).abs().max().item() for a, b in zip(*grads, strict=True)]
    far.append((losses[0] - losses[1]).abs().item() / 100)
    checked = resized(tensors, group)
    for op in opdef.OPERATORS.keys() & OPERATORS.keys():
        test = OPERATORS[op]
        sizes, groups = World(rank, size).of(test)[0]
        sample = next(test.samples(sizes, torch.float32, "cpu"))
        options = {**dict(zip(test.groups, groups, strict=True)), **sample.options}
        operator = opdef.OPERATORS[op]
        args = operator.definition.prepare(**sample.ranks[rank], **options)
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        found = torch.library.opcheck(operator.forward_op, (*args, ""), test_utils=kinds)
        checked += [f"{op} {k}: {v}" for k, v in found.items() if v != "SUCCESS"]
    return graphs, far, checked


def test_compiled_in_one_graph_and_registered_as_torch_wants():
    (graphs, *rest), (_, *other) = run_ranks(compiled, 2, timeout=120)
    for far, checked in (rest, other):
        assert max(far) < 1e-4
        assert checked == []
    forward, backward = graphs
    sent = [name for name in forward + backward if name.startswith("_c10d_functional.")]
    for kind in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all"):
        assert any(kind in name for name in sent), kind
    assert not any(name.startswith("ms.") for name in forward + backward)


def repeated(rank, size):
    """Two runs of each operator, bit by bit."""
    world, differ = World(rank, size), []
    for test, sample, groups, sizes in world.calls(torch.bfloat16):
        one, two = (run_rank(test, sample, groups, sizes, rank) for _ in range(2))
        differ += [f"{test.name} {sample.name} {k}" for k in one if not torch.equal(one[k], two[k])]
    return differ


def test_two_runs_are_equal():
    assert run_ranks(repeated, 2) == [[], []]


def gradients(test, sample, groups, rank, wanted=None, through=None):
    """Gradients of one rank's call: of all arguments or one, through all outputs or one.

    `through` is (output, others): the others get zeros, or are left out.
    """
    given = sample.ranks[rank]
    names = [k for k, t in given.items() if t is not None and t.is_floating_point()]
    leaves = {k: given[k].detach().requires_grad_() for k in names if wanted in (None, k)}
    named = dict(zip(test.groups, groups, strict=True))
    found = test.function(**{**given, **leaves}, **named, **sample.options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(5)
    dense = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    if through is not None:
        one, others = through
        dense = [d if i == one else torch.zeros_like(d) for i, d in enumerate(dense)]
        if others == "left out":
            outputs, dense = [outputs[one]], [dense[one]]
    grads = torch.autograd.grad(outputs, list(leaves.values()), dense)
    return dict(zip(leaves, grads, strict=True)), len(outputs)


def alone(rank, size):
    """Frozen arguments and unused outputs change nothing for the others."""
    world, differ = World(rank, size), []
    for number, (test, sample, groups, _) in enumerate(world.calls(torch.float64)):
        if test.mutates is not None:
            continue
        ms_ops.set_backend("*", ("portable", "reference")[number % 2])
        call = (test, sample, groups, rank)
        whole, outputs = gradients(*call)
        for name, grad in whole.items():
            if not torch.equal(gradients(*call, wanted=name)[0][name], grad):
                differ.append(f"{test.name} {sample.name} {name}")
        for i in range(outputs if outputs > 1 else 0):
            (zeros, _), (none, _) = (
                gradients(*call, through=(i, others)) for others in ("zeros", "left out")
            )
            differ += [
                f"{test.name} {sample.name} output {i} {k}"
                for k in zeros
                if not torch.allclose(zeros[k], none[k], atol=1e-12)
            ]
    return differ


def test_frozen_arguments_and_unused_outputs():
    assert run_ranks(alone, 2, timeout=120) == [[], []]
