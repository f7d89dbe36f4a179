"""Blocks of a step as calls of attention: how many, and what each stands for."""

import torch

from ms_parallel.context import AttnMask, SeqLayout
from ms_parallel.context.calls import calls_of
from support.context import Case, check_case, make_plan
from support.plans import random_plan

CPU = torch.device("cpu")


def calls(plan, node, step, by_position=False):
    return list(calls_of(plan, plan.forward.steps[node][step].blocks, CPU, by_position))


def test_a_step_of_a_causal_ring_is_one_call():
    plan = make_plan(SeqLayout.zigzag(64, 4), AttnMask.causal())
    for node in range(4):
        (own,) = calls(plan, node, 0)
        assert (own.kind, own.q.ranges, own.cu_q) == ("causal", ((0, 16),), None)
        for step in range(1, 4):
            (call,) = calls(plan, node, step)
            assert (call.kind, call.cu_q) == ("full", None)


def test_documents_are_packed():
    documents = (0, 5, 31, 64)
    plan = make_plan(SeqLayout.zigzag_docs(documents, 4), AttnMask.causal(documents))
    for node in range(4):
        (own,) = calls(plan, node, 0)
        assert own.kind == "causal"
        assert own.cu_q.tolist() == own.cu_k.tolist()
        assert own.cu_q[-1] == 16
        for step in range(1, 4):
            (call,) = calls(plan, node, step)
            assert call.kind == "full"
            assert len(call.cu_q) > 2


def test_bands_that_lie_alike_are_packed():
    documents = tuple(range(0, 65, 8))
    plan = make_plan(
        SeqLayout.contiguous(64, 2), AttnMask.window(3, 1, documents), algorithm="ulysses"
    )
    (call,) = calls(plan, 0, 0)
    assert (call.kind, len(call.cu_q)) == ("band", 9)
    check_case(Case(plan))


def test_scattered_tokens_under_a_matrix_are_one_call():
    matrix = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = SeqLayout.from_segments([[(i, i + 1) for i in range(r, 32, 2)] for r in range(2)])
    plan = make_plan(layout, AttnMask.from_matrix(matrix))
    (call,) = calls(plan, 1, 1)
    assert torch.equal(call.tile, matrix[1::2, ::2])
    check_case(Case(plan, batch=2))
    assert len(calls(plan, 1, 1, by_position=True)) > 100


def test_a_row_of_queries_is_in_a_call_once_and_in_order():
    for seed in range(80):
        plan = random_plan(seed)
        for node, steps in enumerate(plan.forward.steps):
            for step in range(len(steps)):
                for call in calls(plan, node, step):
                    ends = [end for pair in call.q.ranges for end in pair]
                    assert ends == sorted(ends)
                    assert all(a < b for a, b in (*call.q.ranges, *call.kv[0].ranges))


def test_by_position_every_block_is_alone():
    plan = make_plan(SeqLayout.zigzag(64, 4), AttnMask.causal())
    found = calls(plan, 1, 0, by_position=True)
    assert [(c.kind, c.q_pos, c.k_pos) for c in found] == [
        ("causal", 8, 8), ("full", 48, 8), ("causal", 48, 48)
    ]  # fmt: skip
