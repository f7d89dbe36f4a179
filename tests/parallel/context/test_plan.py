"""Plans of any layout, mask, algorithm: proven right, and the proof catches wrong ones."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_parallel.context.build import plan_attention
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from ms_parallel.context.proof import PlanError, verify
from support.plans import counts, random_arguments, random_plan

HEADS = {"heads": (4, 2), "head_dims": (4, 4)}


@given(st.integers(0, 2**32))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_plan_is_proven(seed):
    plan = random_plan(seed)
    verify(plan)
    expected = plan.mask.matrix(plan.layout.total).long()
    assert torch.equal(counts(plan, plan.forward), expected)
    assert torch.equal(counts(plan, plan.backward), expected)


def test_empty_tiles_are_never_scheduled():
    for seed in range(100):
        plan = random_plan(seed)
        blocks = [b for s in plan.forward.steps for step in s for b in step.blocks]
        assert all(b.cells for b in blocks)
        together = list(zip(*plan.forward.steps, strict=True))
        busy = [any(s.blocks or s.wait or s.post for s in steps) for steps in together]
        assert all(busy) or len(busy) == 1


def test_same_arguments_same_plan():
    layout, mask = SeqLayout.zigzag(32, 4), AttnMask.causal((0, 5, 32))
    one = plan_attention(layout, mask, **HEADS)
    assert plan_attention(SeqLayout.zigzag(32, 4), AttnMask.causal((0, 5, 32)), **HEADS) is one
    other = plan_attention(layout, mask, **HEADS, pruned=True)
    assert one != other
    assert hash(one) == hash(replace(one))
    assert replace(one) == one


def test_zigzag_is_balanced_in_every_step():
    for pruned in (False, True):
        plan = plan_attention(
            SeqLayout.zigzag(64, 8), AttnMask.causal(), **HEADS, window=2, pruned=pruned
        )
        for t in range(8):
            cells = {sum(b.cells for b in steps[t].blocks) for steps in plan.forward.steps}
            assert cells == {36} if t == 0 else {32}


def test_local_attention_after_the_exchange_is_one_block():
    plan = plan_attention(SeqLayout.zigzag(64, 4), AttnMask.causal(), **HEADS, algorithm="ulysses")
    ((step,),) = plan.forward.steps
    (block,) = step.blocks
    assert (block.kind, block.q0, block.q1, block.k1) == ("causal", 0, 64, 64)


def test_a_window_ends_the_ring_when_pruned():
    plan = plan_attention(SeqLayout.contiguous(64, 8), AttnMask.window(8), **HEADS, pruned=True)
    assert len(plan.forward.steps[0]) == 2
    assert sorted((t.src, t.dst) for t in plan.forward.transfers) == [(n, n + 1) for n in range(7)]


# Each takes a plan and a random generator and returns a wrong one, or None where it cannot.


def _changed(plan, name, node, t, **fields):
    program = getattr(plan, name)
    steps = [list(s) for s in program.steps]
    steps[node][t] = replace(steps[node][t], **fields)
    return replace(plan, **{name: replace(program, steps=tuple(map(tuple, steps)))})


def _places(plan, name, has):
    return [
        (name, node, t, step)
        for node, steps in enumerate(getattr(plan, name).steps)
        for t, step in enumerate(steps)
        if has(step)
    ]


def drop_block(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.blocks))
    return _changed(plan, name, node, t, blocks=step.blocks[1:])


def double_block(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.blocks))
    return _changed(plan, name, node, t, blocks=step.blocks + step.blocks[-1:])


def shift_block(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.blocks))
    first = step.blocks[0]
    moved = replace(first, k0=first.k0 + 1, k1=first.k1 + 1)
    return _changed(plan, name, node, t, blocks=(moved, *step.blocks[1:]))


def block_of_another_kind(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.blocks))
    first = step.blocks[0]
    kind = "causal" if first.kind == "full" else "full"
    if first.q1 - first.q0 == 1 == first.k1 - first.k0:
        return None
    return _changed(plan, name, node, t, blocks=(replace(first, kind=kind), *step.blocks[1:]))


def block_of_another_step(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.wait and s.blocks))
    early = getattr(plan, name).steps[node][t - 1]
    wrong = _changed(plan, name, node, t, blocks=())
    return _changed(wrong, name, node, t - 1, blocks=early.blocks + step.blocks)


def miss_post(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.post))
    return _changed(plan, name, node, t, post=step.post[1:])


def miss_wait(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.wait))
    return _changed(plan, name, node, t, wait=step.wait[1:])


def wait_early(plan, rng, name):
    name, node, t, step = rng.choice(_places(plan, name, lambda s: s.wait))
    wrong = _changed(plan, name, node, t, wait=())
    return _changed(wrong, name, node, t - 1, wait=step.wait)


def swap_order(plan, rng, name):
    places = _places(plan, name, lambda s: len(s.post) > 1)
    if not places:
        return None
    name, node, t, step = rng.choice(places)
    return _changed(plan, name, node, t, post=step.post[::-1])


def free_early(plan, rng, name):
    places = _places(plan, name, lambda s: s.free)
    places = [p for p in places if p[2] > 0]
    if not places:
        return None
    name, node, t, step = rng.choice(places)
    wrong = _changed(plan, name, node, t, free=step.free[1:])
    before = getattr(plan, name).steps[node][t - 1]
    return _changed(wrong, name, node, t - 1, free=before.free + step.free[:1])


def wrong_receiver(plan, rng, name):
    program = getattr(plan, name)
    at = rng.randrange(len(program.transfers))
    transfer = program.transfers[at]
    wrong = replace(transfer, dst=(transfer.dst + 1) % plan.nodes.size)
    transfers = (*program.transfers[:at], wrong, *program.transfers[at + 1 :])
    return replace(plan, **{name: replace(program, transfers=transfers)})


def lose_sums(plan, rng, name):
    sums = {t.index for t in plan.backward.transfers if t.buffers[0].what == "dkv"}
    places = _places(plan, "backward", lambda s: sums & {*s.wait_after})
    name, _node, _t, step = rng.choice(places)
    index = next(i for i in step.wait_after if i in sums)
    wrong = plan
    for n, steps in enumerate(plan.backward.steps):
        for u, s in enumerate(steps):
            if index in (*s.post, *s.wait_after):
                post = tuple(i for i in s.post if i != index)
                after = tuple(i for i in s.wait_after if i != index)
                wrong = _changed(wrong, name, n, u, post=post, wait_after=after)
    return wrong


MUTANTS = [
    drop_block, double_block, shift_block, block_of_another_kind, block_of_another_step, miss_post,
    miss_wait, wait_early, swap_order, free_early, wrong_receiver, lose_sums,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_wrong_plans_are_caught(mutant, name):
    rng = random.Random(mutant.__name__ + name)
    made = 0
    for window, pruned in ((1, False), (2, False), (1, True), (2, True)):
        plan = plan_attention(
            SeqLayout.zigzag(40, 4), AttnMask.causal((0, 17, 40)), **HEADS,
            window=window, pruned=pruned,
        )  # fmt: skip
        for _ in range(3):
            wrong = mutant(plan, rng, name)
            if wrong is None or wrong == plan:
                continue
            made += 1
            with pytest.raises(PlanError):
                verify(wrong)
    assert made >= 3


def test_wrong_heads_and_nodes_are_caught():
    plan = plan_attention(
        SeqLayout.zigzag(24, 4), AttnMask(), heads=(24, 6), head_dims=(4, 4), algorithm="ulysses"
    )
    verify(plan)
    right = plan.heads
    assert right.kv == ((0, 2), (1, 3), (3, 5), (4, 6))
    even = (
        (0, 2),
        (2, 4),
        (4, 5),
        (5, 6),
    )  # split as evenly as the query heads: not what they read
    for wrong in (
        replace(plan, heads=replace(right, kv=even)),
        replace(plan, heads=replace(right, kv=right.kv[:3])),
        replace(plan, heads=replace(right, q=((0, 6), (6, 12), (12, 17), (18, 24)))),
        replace(plan, nodes=SeqLayout.from_segments([[(4, 24), (0, 4)]])),
        replace(plan, ulysses=2),
    ):
        with pytest.raises(PlanError):
            verify(wrong)


def test_the_race_of_the_two_level_ring_is_caught():
    # The outer message still reads what the inner ring receives into: freed a step too early.
    plan = plan_attention(SeqLayout.zigzag(64, 8), AttnMask.causal(), **HEADS, window=4)
    outer = next(t for t in plan.forward.transfers if t.level == "outer")
    (freed,) = plan.forward.steps[outer.src][3].free[:1]
    assert outer.buffers[0] in plan.forward.steps[outer.src][3].free
    rest = tuple(b for b in plan.forward.steps[outer.src][3].free if b != outer.buffers[0])
    wrong = _changed(plan, "forward", outer.src, 3, free=rest)
    early = plan.forward.steps[outer.src][0].free
    wrong = _changed(wrong, "forward", outer.src, 0, free=(*early, outer.buffers[0]))
    with pytest.raises(PlanError, match="while it is sent"):
        verify(wrong)
    assert freed


CASES = [
    ({"algorithm": "tree"}, "algorithm: got 'tree', need one of 'ring'"),
    ({"kv_keep": "v"}, "kv_keep: got 'v', need one of"),
    ({"algorithm": "usp", "ulysses": 4}, r"got 4, need a divisor of the 6 .* \[1, 2, 3, 6\]"),
    ({"algorithm": "usp"}, r"ulysses: got 1, need one of \[2, 3\] with algorithm \"usp\""),
    ({"algorithm": "usp", "ulysses": 6}, r"ulysses: got 6, need one of \[2, 3\]"),
    ({"ulysses": 2}, 'ulysses: got 2, need 1 with algorithm "ring", or algorithm "usp"'),
    ({"algorithm": "ulysses", "ulysses": 2}, "ulysses: got 2, need 6, all processes"),
    ({"algorithm": "allgather_kv", "ulysses": 6}, "ulysses: got 6, need less than all 6"),
    ({"window": 0}, r"window: got 0, need one of \[1, 2, 3\]"),
    ({"window": 6}, r"window: got 6, need one of \[1, 2, 3\]"),
    ({"window": 4}, r"window: got 4, need one of \[1, 2, 3\]"),
    ({"algorithm": "usp", "ulysses": 2, "window": 3}, r"window: got 3, need one of \[1\]"),
    ({"algorithm": "allgather_kv", "window": 2}, "window: got 2, need 1 with algorithm"),
    ({"heads": (6, 4)}, r"\(6, 4\), need query heads that are a multiple"),
    ({"head_dims": (0, 4)}, r"head_dims: got \(0, 4\)"),
    ({"kv_keep": "pre"}, "kv_keep: got 'pre', need \"last\", \"k\" or \"kv\" between nodes"),
    ({"kv_keep": "pre_k"}, "between nodes: \"pre_k\" is for algorithm \"ulysses\""),
    ({"algorithm": "ulysses", "kv_keep": "kv"}, "kv_keep: got 'kv', need \"last\", \"pre\" or"),
    ({"algorithm": "ulysses", "pruned": True}, "pruned: got True, need False"),
    ({"grad_bytes": 3}, "grad_bytes: got 3"),
    ({"uneven": False}, "50 tokens, .* need a multiple of 6 processes"),
    ({"mask": AttnMask.causal((0, 49))}, "documents: got 49"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), CASES, ids=lambda a: str(a)[:40])
def test_conflicts(arguments, text):
    given = {"layout": SeqLayout.zigzag(50, 6), "mask": AttnMask.causal(), **HEADS, **arguments}
    with pytest.raises(ValueError, match=text):
        plan_attention(**given)


def test_keeping_what_is_not_copied_is_warned_of():
    given = {"layout": SeqLayout.zigzag(8, 2), "mask": AttnMask.causal(), "algorithm": "ulysses"}
    with pytest.warns(UserWarning, match='"pre" keeps no less here than "last", and sends more'):
        plan_attention(**given, **HEADS, kv_keep="pre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for keep in ("pre", "pre_k"):
            plan_attention(**given, heads=(4, 1), head_dims=(4, 4), kv_keep=keep)


def test_conflicts_of_sizes():
    one, two = SeqLayout.zigzag(8, 1), SeqLayout.zigzag(8, 2)
    causal = AttnMask.causal()
    with pytest.raises(ValueError, match="kv_keep: got 'kv', need \"last\" with 1 process"):
        plan_attention(one, causal, **HEADS, kv_keep="kv")
    with pytest.raises(ValueError, match="no nodes of more than one"):
        plan_attention(two, causal, **HEADS, algorithm="usp", ulysses=2)
    text = r"6 query heads, need query heads that ulysses = 4 divides \(2 does\)"
    with pytest.raises(ValueError, match=text):
        plan_attention(
            SeqLayout.zigzag(8, 4), causal, heads=(6, 6), head_dims=(4, 4), algorithm="ulysses",
            uneven=False,
        )  # fmt: skip
    for algorithm in ("ring", "ulysses", "usp", "allgather_kv"):
        arguments = {"algorithm": algorithm, "uneven": False}
        if algorithm != "usp":
            verify(plan_attention(one, causal, **HEADS, **arguments))


def test_a_long_ring_is_planned_at_once():
    arguments = random_arguments(0) | {"algorithm": "ring", "ulysses": 1, "kv_keep": "last"}
    arguments |= {"layout": SeqLayout.zigzag(2**20, 64), "mask": AttnMask.causal(), "window": 8}
    arguments["budget"] = None
    plan = plan_attention(**arguments)
    assert sum(c.cells for c in plan.cost(2)) == 2**19 * (2**20 + 1)
