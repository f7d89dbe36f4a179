"""All ranks of a plan together compute what one process computes, and send what the plan says."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ms_ops.attention import attention
from ms_parallel.context.build import plan_attention
from ms_parallel.context.heads import HeadPlan
from ms_parallel.context.job import make_job
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from ms_parallel.context.operator import kept
from ms_parallel.context.simulate import Simulation, simulate_attention
from ms_parallel.context.state import saved
from support.context import (
    Case,
    check_case,
    error,
    make_plan,
    random_options,
)
from support.mutation import Mutation, assert_caught
from support.plans import random_arguments


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_plan(seed):
    arguments = random_arguments(seed) | {"grad_bytes": 8}
    assume(arguments["layout"].size < 12 or seed % 3 == 0)  # Many ranks take long.
    options = random_options(seed, arguments["heads"][0])
    plan = plan_attention(**arguments)
    check_case(Case(plan, batch=1 + seed % 2, seed=seed % 1000, options=options))


ALGORITHMS = (
    {},
    {"pruned": True},
    {"window": 4},
    {"window": 2, "pruned": True, "kv_keep": "k"},
    {"algorithm": "ulysses"},
    {"algorithm": "usp", "ulysses": 2, "window": 2},
    {"algorithm": "allgather_kv", "ulysses": 2},
    {"algorithm": "tasks"},
)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (AttnMask.causal((0, 33, 40, 130)), {"algorithm": "usp", "ulysses": 8, "window": 2}),
        (AttnMask.window(3), {"pruned": True}),
    ],
)
def test_64_ranks(mask, options):
    layout = SeqLayout.contiguous(130, 64)
    check_case(Case(make_plan(layout, mask, heads=(8, 2), **options)))


def test_accumulators_are_wide():
    """The error in bf16 does not grow with the number of ranks, and is that of one process."""
    layout = SeqLayout.zigzag(256, 1)
    one = Case(make_plan(layout, AttnMask.causal(), grad_bytes=4), dtype=torch.bfloat16)
    exact = one.whole()
    size = [t.pow(2).mean().sqrt() for t in exact]

    def errors(found):
        pairs = zip(found, exact, size, strict=True)
        return torch.stack([(a.double() - b).pow(2).mean().sqrt() / s for a, b, s in pairs])

    plain = errors(one.whole(torch.bfloat16))
    for ranks, options in (
        (2, {}),
        (8, {"kv_keep": "kv"}),
        (8, ALGORITHMS[5]),
        (32, {"pruned": True}),
    ):
        layout = SeqLayout.zigzag(256, ranks)
        plan = make_plan(layout, AttnMask.causal(), grad_bytes=4, **options)
        found = errors(Case(plan, dtype=torch.bfloat16).simulated())
        assert (found <= 1.3 * plain).all(), f"{ranks} ranks: {found} of {plain}"


@pytest.mark.parametrize("options", ALGORITHMS)
def test_dropout_does_not_depend_on_the_plan(options):
    layout = SeqLayout.zigzag(37, 8)
    dropout = {"dropout_p": 0.5, "dropout_rng": torch.tensor([3, 5])}
    plan = make_plan(layout, AttnMask.causal(), heads=(8, 2), **options)
    check_case(Case(plan, options=dropout))


@pytest.mark.parametrize("options", ALGORITHMS[3::2])
def test_sink(options):
    layout = SeqLayout.zigzag(19, 8)
    plan = make_plan(layout, AttnMask.window(4), heads=(6, 3), head_dims=(8, 4), **options)
    sink = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    case = Case(plan)
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    mask = plan.mask.matrix(19)
    whole = attention(*leaves, mask=mask, sink=sink)
    expected = torch.autograd.grad(whole, [*leaves, sink], case.dout)
    shards = [case.shards(r) for r in range(8)]
    parts = list(zip(*shards, strict=True))
    outs = simulate_attention(*parts, plan, sink=sink)
    flat = [t for part in parts for t in part]
    douts = [layout.shard(case.dout, r, 1) for r in range(8)]
    *grads, dsink = torch.autograd.grad(outs, [*flat, sink], douts)
    found = [layout.unshard(grads[i * 8 : i * 8 + 8], 1) for i in range(3)]
    assert error([layout.unshard(outs, 1), *found, dsink], [whole, *expected]) < 1e-10


def test_backward_twice():
    """Backward changes nothing of what forward kept."""
    for options in ALGORITHMS[3:5]:
        plan = make_plan(SeqLayout.zigzag(21, 8), AttnMask.causal(), **options)
        case = Case(plan)
        shards = [t for r in range(8) for t in case.shards(r)]
        outs = simulate_attention(shards[::3], shards[1::3], shards[2::3], plan)
        ones = [torch.ones_like(t) for t in outs]
        once, again = (torch.autograd.grad(outs, shards, ones, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_layouts_strides_and_gradients_of_some_inputs():
    layout = SeqLayout.zigzag(13, 2)
    plan = make_plan(layout, AttnMask.causal(), heads=(4, 2), head_dims=(6, 4))
    case = Case(plan, batch=2)
    q, k, v = (list(parts) for parts in zip(*(case.shards(r) for r in range(2)), strict=True))
    expected = simulate_attention(q, k, v, plan)
    whole = torch.autograd.grad(expected, [*k], [torch.ones_like(t) for t in expected])
    turned = [[t.transpose(0, 1) for t in part] for part in (q, k, v)]
    outs = simulate_attention(*turned, plan, layout="sbhd")
    for a, b in zip(outs, expected, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b.transpose(0, 1))
    some = [[t.detach() for t in part] for part in (q, v)]
    strided = [torch.cat((t, t), -1)[..., :6].detach().requires_grad_() for t in k]
    outs = simulate_attention(some[0], strided, some[1], plan)
    grads = torch.autograd.grad(outs, strided, [torch.ones_like(t) for t in outs])
    assert error(grads, whole) == 0


def test_one_key_head_expanded_and_packed_rows():
    layout = SeqLayout.zigzag_docs((0, 3, 14), 3)
    plan = make_plan(layout, AttnMask.causal((0, 3, 14)), heads=(3, 3))
    case = Case(plan)
    flat = [[t[0].detach() for t in part] for part in zip(*map(case.shards, range(3)), strict=True)]
    flat[1] = [t[:, :1].expand(-1, 3, -1) for t in flat[1]]
    case.k = case.k[:, :, :1].expand(-1, -1, 3, -1)
    outs = simulate_attention(*flat, plan, layout="thd")
    assert error([layout.unshard(outs, 0)], [case.whole()[0][0]]) < 1e-10


@pytest.mark.parametrize("options", [{}, ALGORITHMS[4], ALGORITHMS[7]])
def test_nan_stays_where_it_is(options):
    documents = (0, 9, 20, 31)
    layout = SeqLayout.zigzag(31, 4)
    plan = make_plan(layout, AttnMask.causal(documents), **options)
    clean = Case(plan).simulated()[0]
    case = Case(plan)
    case.q[:, 4] = torch.nan
    others = [i for i in range(31) if i != 4]
    assert torch.equal(case.simulated()[0][:, others], clean[:, others])
    case = Case(plan)
    case.v[:, 12] = torch.nan
    out, dq, dk, dv = case.simulated()
    for t in (out, dq, dk):
        assert not t[:, :9].isnan().any()
        assert not t[:, 20:].isnan().any()
    assert not dv.isnan().any()
    assert out[:, 12:20].isnan().all()


def test_rows_without_keys_and_empty_ranks():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[3, 1] = mask[7, 8] = True
    layout = SeqLayout.from_segments([[(4, 9)], [], [(0, 4)], []])
    for options in ({}, {"algorithm": "usp", "ulysses": 2}, {"algorithm": "tasks"}):
        case = Case(make_plan(layout, AttnMask.from_matrix(mask), **options))
        check_case(case)
        out, dq, *_ = case.simulated()
        unseen = [0, 1, 2, 4, 5, 6, 8]
        assert not out[:, unseen].any()
        assert not dq[:, unseen].any()
    check_case(Case(make_plan(SeqLayout.contiguous(0, 3), AttnMask.causal())))


def test_kept_keys_and_values_change_no_bit():
    layout = SeqLayout.zigzag(48, 8)
    for options in ({}, {"window": 4}):
        found = []
        for keep in ("last", "k", "kv"):
            plan = make_plan(layout, AttnMask.causal(), kv_keep=keep, **options)
            record = Simulation()
            found.append(Case(plan).simulated(record))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b)


EXCHANGES = (
    Mutation(
        "keys forgotten",
        "ms_parallel.context.backward:backward_steps",
        "[t for t in inputs[1:] if t is not None]",
        "[]",
    ),
    Mutation(
        "values too",
        "ms_parallel.context.state:needs_inputs",
        'keep == "pre"',
        'keep in ("pre", "pre_k")',
    ),
    Mutation(
        "values for keys",
        "ms_parallel.context.operator:kept",
        "zip(tensors, needed",
        "zip(tensors, (needed[0], needed[2], needed[1], needed[3])",
    ),
)


def test_keys_kept_from_before_the_exchange():
    layout = SeqLayout.zigzag(22, 4)
    mask, options = AttnMask.causal((0, 9, 22)), {"heads": (6, 3), "algorithm": "ulysses"}

    def found(keep):
        plan = make_plan(layout, mask, kv_keep=keep, **options)
        case = Case(plan, batch=2)
        check_case(case)
        return case.simulated()

    last, both, keys = map(found, ("last", "pre", "pre_k"))
    for whole, *others in zip(last, both, keys, strict=True):
        assert all(torch.equal(whole, other) for other in others)
    for mutation in EXCHANGES:
        assert_caught(mutation, lambda: found("pre_k"), (AssertionError, RuntimeError))


def test_a_place_without_heads_and_uneven_groups():
    plan = make_plan(
        SeqLayout.contiguous(11, 6), AttnMask.causal(), heads=(4, 2), algorithm="ulysses"
    )
    assert plan.heads == HeadPlan(
        ((0, 1), (1, 2), (2, 3), (3, 4), (4, 4), (4, 4)),
        ((0, 1), (0, 1), (1, 2), (1, 2), (2, 2), (2, 2)),
    )
    check_case(Case(plan, batch=2))
    uneven = make_plan(
        SeqLayout.zigzag(11, 4), AttnMask.causal(), heads=(24, 6), algorithm="ulysses"
    )
    check_case(Case(uneven))


def test_low_precision_sums_of_shared_heads_travel_wide():
    plan = make_plan(
        SeqLayout.zigzag(24, 4), AttnMask.causal(), (6, 1), (5, 3), 4, algorithm="ulysses"
    )
    assert plan.heads.shared
    case = Case(plan, batch=1, dtype=torch.bfloat16)
    record = Simulation()
    found = case.simulated(record)
    assert error(found, case.whole()) < 0.1
    planned = [c.backward_bytes for c in plan.cost(2)]
    assert [sent.bytes for sent in record.backward] == planned


def bytes_kept(options):
    """Bytes that backward of a rank keeps of queries, output and statistics, and of keys."""
    plan = make_plan(SeqLayout.zigzag(32, 4), AttnMask.causal(), grad_bytes=4, **options)
    like = torch.empty(0, dtype=torch.bfloat16)
    job = make_job(plan, 1, like, batch=3)
    inputs = sum(t.nbytes for t in kept(job, case_tensors(plan)) if t is not None)
    state = sum(torch.empty(item.shape, dtype=item.dtype).nbytes for item in saved(job))
    rows, heads, kv_heads = plan.nodes.length(1 // plan.ulysses), *sizes(plan)
    fixed = 3 * rows * heads * (2 * 8 * 2 + 4)
    return inputs + state - fixed, 3 * 32 * kv_heads * 8 * 2


def sizes(plan):
    (q0, q1), (k0, k1) = plan.heads.q[1 % plan.ulysses], plan.heads.kv[1 % plan.ulysses]
    return q1 - q0, k1 - k0


def case_tensors(plan):
    shapes = [(4, 8), (2, 8), (2, 8), (4, 8)]
    return [torch.empty(3, 8, *shape, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.parametrize(
    ("options", "keys", "values"),
    [
        ({}, 1, 1),  # Quarters of the whole sequence.
        ({"kv_keep": "k"}, 3, 1),
        ({"kv_keep": "kv"}, 3, 3),
        ({"algorithm": "ulysses"}, 4, 4),
        ({"algorithm": "ulysses", "kv_keep": "pre"}, 2, 2),
        ({"algorithm": "ulysses", "kv_keep": "pre_k"}, 2, 4),
        ({"algorithm": "allgather_kv"}, 1, 1),
        ({"algorithm": "allgather_kv", "kv_keep": "k"}, 4, 1),
        ({"algorithm": "allgather_kv", "kv_keep": "kv"}, 4, 4),
        ({"algorithm": "usp", "ulysses": 2}, 2, 2),
    ],
)
def test_backward_keeps_what_the_policy_says_and_nothing_else(options, keys, values):
    """Beside it 4 bytes a row and head, queries and output."""
    found, whole = bytes_kept(options)
    assert found == whole * (keys + values) / 4
