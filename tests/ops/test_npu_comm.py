"""NPU backends that communicate, on the emulated torch_npu over gloo: values, wrong calls."""

import pytest
import torch
import torch.distributed as dist

import ms_ops
from ms_ops import comm, registry
from ms_ops.opdef import OPERATORS as DEFINED
from ms_ops.testing.cases.comm import OPERATORS
from ms_ops.testing.comm import check_fake_rank, check_ranks
from ms_ops.testing.npu import emulated_npu
from ms_ops.testing.npu.comm import named_groups
from support.comm_ranks import ON_NPU, World
from support.fake import fake_world
from support.mutation import Mutation
from support.ranks import run_ranks

NPU = "ms_ops.fused_comm.npu"
DTYPES = (torch.bfloat16, torch.float16)


def declined(test, sample, groups, rank):
    """Why the NPU backend does not take a call, None if it does."""
    definition = DEFINED[test.name].definition
    named = dict(zip(test.groups, groups, strict=True))
    facts = definition.facts(*definition.prepare(**sample.ranks[rank], **named, **sample.options))
    reasons = {v.backend: v.reason for v in registry.verdicts(test.name, facts)}
    return reasons.get("npu", "no kernel")


def values(rank, size, dtypes):
    """Check what the backend takes; return failures, which operators ran, and what was called."""
    world, wrong, ran = World(rank, size), [], set()
    with emulated_npu() as calls, named_groups(*world.all_groups()):
        for dtype in dtypes:
            for test, sample, groups, sizes in world.calls(dtype):
                if declined(test, sample, groups, rank):
                    continue
                ran.add(test.name)
                try:
                    check_ranks(test, sample, groups, sizes, rank, "npu")
                    if dtype is DTYPES[0] and size == 2:
                        check_fake_rank(test, sample, groups, rank, "npu")
                except AssertionError as error:
                    wrong.append(str(error))
        names = {call.name for call in calls}
    return wrong, ran, names


@pytest.mark.parametrize(("size", "dtypes"), [(2, DTYPES[:1]), (4, DTYPES[1:])], ids=["2", "4"])
def test_values_gradients_and_fakes(size, dtypes):
    for wrong, ran, names in run_ranks(values, size, dtypes, timeout=120):
        assert wrong == []
        assert ran == set(ON_NPU)
        assert names >= {
            "npu::npu_all_gather_base_mm",
            "npu::npu_mm_reduce_scatter_base",
            "npu::npu_mm_all_reduce_base",
            "npu::npu_add_rms_norm",
        }


MUTANTS = [
    (op, Mutation(*parts))
    for op, *parts in (
        ("matmul_all_reduce", "bias inside the sum", f"{NPU}:product",
         "y = _summed(a, matrix, reduce)",
         "y = npu.op('npu_mm_all_reduce_base')(*_filled(a, matrix), reduce, bias=bias)"),
        ("matmul_all_reduce", "not filled up", f"{NPU}:_summed",
         "rows, matrix = _filled(rows, matrix)", "rows = rows.contiguous()"),
        ("matmul_reduce_scatter", "operation by another name", f"{NPU}:_scattered",
         "reduce_op", "op"),
        ("matmul_reduce_scatter", "strided factor", f"{NPU}:_operand", "if plain", "if True"),
        ("matmul_reduce_scatter", "gradient not gathered", f"{NPU}:product_backward",
         "da, grad = _gathered(dy, matrix, reduce, reduce_size, True)",
         "da, _ = _gathered(dy, matrix, reduce, reduce_size, True)"),
        ("all_gather_matmul", "rows not asked for", f"{NPU}:_gathered",
         "gather_output=keep", "gather_output=False"),
        ("all_gather_matmul", "number of ranks", f"{NPU}:_gathered", "name, size,", "name, 4,"),
        ("all_gather_matmul", "gradient of the rows dropped", f"{NPU}:product_backward",
         "elif gather and dkept is None", "elif gather"),
        ("matmul_all_reduce_add_rms_norm", "residual inside the sum", f"{NPU}:add_norm",
         "total = upcast(_summed(x, matrix, group))",
         "total = upcast(npu.op('npu_mm_all_reduce_base')(*_filled(x, matrix), group, x3=residual))"
         " - residual"),
        ("matmul_all_reduce_add_rms_norm", "sum and norm exchanged", f"{NPU}:add_norm",
         "normed, rstd, y =", "y, rstd, normed ="),
        ("grouped_matmul_all_reduce", "missing reduce", f"{NPU}:grouped", "y = sum_ranks(",
         "y = (lambda y, _: y)("),
    )
]  # fmt: skip
# These tell the mutants.
ENOUGH = ("bias", "wide_sliced_b", "wide", "returned")


def mutants(rank, size):
    """Which wrong calls some sample tells from the right ones on this rank."""
    world, caught = World(rank, size), []
    with emulated_npu(), named_groups(*world.all_groups()):
        for op, mutation in MUTANTS:
            test, seen = OPERATORS[op], False
            sizes, groups = world.of(test)[0]
            with mutation.applied():
                for sample in test.samples(sizes, torch.bfloat16, "cpu"):
                    if sample.name not in ENOUGH:
                        continue
                    try:
                        check_ranks(test, sample, groups, sizes, rank, "npu")
                    except (AssertionError, IndexError, RuntimeError):
                        seen = True
            caught.append(seen)
    return caught


def test_wrong_calls_are_caught():
    seen = [any(ranks) for ranks in zip(*run_ranks(mutants, 2, timeout=120), strict=True)]
    missed = [f"{op}: {m.name}" for (op, m), found in zip(MUTANTS, seen, strict=True) if not found]
    assert missed == []


def test_what_is_declined():
    with fake_world(4), emulated_npu():
        low = torch.randn(4, 4).bfloat16()
        alone, three = dist.new_group([0]), dist.new_group([0, 1, 2])
        for group, tensor, reason in (
            (alone, low, "a group of one rank"),
            (three, low, "serve 2, 4 or 8 ranks, not [3]"),
            (dist.group.WORLD, low.float(), "no kernel for torch.float32"),
        ):
            lines = ms_ops.explain("matmul_all_reduce", tensor, tensor, group)
            assert f"npu (priority 10): {reason}" in lines or reason in lines.splitlines()[0]
        with (
            ms_ops.backend("npu"),
            pytest.raises(ms_ops.BackendError, match="need another: a group of one rank"),
        ):
            comm.matmul_all_reduce(low, low, alone)
