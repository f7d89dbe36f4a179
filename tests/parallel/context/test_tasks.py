"""Mask-driven placement: every tile once, within the budget, on any grid and any mask."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_parallel.context.adaptive import coarse, optimize_layout
from ms_parallel.context.build import plan_attention
from ms_parallel.context.cost import transfer_bytes
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask
from ms_parallel.context.proof import verify
from ms_parallel.context.tasks import assign_tasks
from ms_parallel.context.tiles import Tiles, join_dense
from support.plans import random_documents, random_mask

HEADS = {"heads": (4, 2), "head_dims": (4, 6)}


@given(st.integers(0, 2**32))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_every_tile_once_and_never_over_budget(seed):
    rng = random.Random(seed)
    nodes, budget, density = rng.randint(1, 9), rng.randint(2, 9), rng.random()
    grid = {
        (q, kv): rng.randint(1, 50)
        for q in range(nodes)
        for kv in range(nodes)
        if rng.random() < density
    }
    tasks = assign_tasks(grid, nodes, budget)
    assert Counter((t.q, t.kv) for t in tasks) == Counter(grid.keys())
    spent = Counter()
    for task in tasks:
        assert task.at in (task.q, task.kv)
        assert (task.round == 0) == (task.q == task.kv)
        if task.q == task.kv:
            continue
        moves = ((task.round, 2),) if task.at == task.q else ((task.round, 1), (task.round + 1, 1))
        for node in (task.q, task.kv):
            for number, units in moves:
                spent[node, number] += units
    assert all(units <= budget for units in spent.values())
    remote = [t for t in tasks if t.round]
    assert all(n == 1 for n in Counter((t.at, t.round) for t in remote).values())
    asked = Counter((t.q, t.round) for t in remote if t.at == t.kv)
    assert all(n == 1 for n in asked.values())


def test_a_full_grid_takes_as_many_rounds_as_a_ring():
    for nodes in (2, 3, 5, 8):
        grid = {(q, kv): 1 for q in range(nodes) for kv in range(nodes)}
        tasks = assign_tasks(grid, nodes)
        assert max(t.round for t in tasks) == nodes - 1
        assert all(t.at == t.q for t in tasks)


def test_idle_nodes_take_queries():
    # All of node 0's queries see everything, nobody else's see more than their own keys.
    grid = {(0, kv): 10 for kv in range(4)} | {(n, n): 10 for n in range(4)}
    tasks = assign_tasks(grid, 4)
    assert max(t.round for t in tasks) == 2
    assert Counter(t.at for t in tasks if t.round)[0] < 3


def masks(total, generator):
    at = torch.arange(total)
    causal = at <= at.unsqueeze(1)
    squares = torch.rand(total // 4, total // 4, generator=generator) < 0.3
    yield "causal", causal
    yield "window", causal & (at > at.unsqueeze(1) - 9)
    yield "prefix", causal | (at < 7)
    yield "squares", squares.repeat_interleave(4, 0).repeat_interleave(4, 1)
    yield (
        "no diagonal",
        (squares & ~torch.eye(total // 4).bool()).repeat_interleave(4, 0).repeat_interleave(4, 1),
    )
    yield "nothing", torch.zeros(total, total, dtype=torch.bool)
    shuffled = torch.randperm(total, generator=generator) % 4
    yield "groups", shuffled == shuffled.unsqueeze(1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_plans_of_optimized_layouts_are_right(size):
    for _, matrix in masks(32, torch.Generator().manual_seed(size)):
        mask = AttnMask.from_matrix(matrix)
        layout = optimize_layout(mask, size)
        assert max(layout.lengths) - min(layout.lengths) <= 1
        assert all(list(s) == sorted(s) for s in layout.shards)
        for keep in ("last", "k", "kv"):
            verify(plan_attention(layout, mask, **HEADS, algorithm="tasks", kv_keep=keep))


def test_scattered_groups_come_together():
    # Tokens of 4 groups, shuffled, that see their own group only: no tile is left to move.
    group = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 4
    mask = AttnMask.from_matrix(group == group.unsqueeze(1))
    plans = {
        name: plan_attention(layout, mask, **HEADS, algorithm="tasks")
        for name, layout in (
            ("as it is", SeqLayout.contiguous(64, 4)),
            ("optimized", optimize_layout(mask, 4, side=64)),
        )
    }
    moved = {name: sum(c.forward_bytes for c in p.cost(2)) for name, p in plans.items()}
    assert moved["optimized"] == 0 < moved["as it is"]
    assert len({c.cells for c in plans["optimized"].cost(2)}) == 1


def test_the_same_mask_gives_the_same_layout():
    for _, matrix in masks(64, torch.Generator().manual_seed(1)):
        mask = AttnMask.from_matrix(matrix)
        assert optimize_layout(mask, 4) == optimize_layout(AttnMask.from_matrix(matrix.clone()), 4)


def test_structured_masks_and_nodes():
    for seed in range(12):
        rng = random.Random(seed)
        documents = random_documents(rng)
        mask, total = random_mask(rng, documents), documents[-1]
        layout = optimize_layout(mask, 6, total, ulysses=2, side=16)
        assert layout.size == 6
        plan = plan_attention(layout, mask, **HEADS, algorithm="tasks", ulysses=2)
        verify(plan)
        assert layout.grouped(2).subdivided(2) == layout


def test_no_square_is_lost_in_coarsening():
    for total, side in ((64, 16), (61, 16), (5, 9), (33, 32)):
        generator = torch.Generator().manual_seed(total)
        matrix = torch.rand(total, total, generator=generator) < 0.1
        for mask in (AttnMask.from_matrix(matrix), AttnMask.window(3, 2)):
            units = SeqLayout.contiguous(total, side)
            dense = mask.matrix(total)
            expected = [
                [dense[units.local_index(q)][:, units.local_index(k)].sum() for k in range(side)]
                for q in range(side)
            ]
            got = coarse(mask, units)
            sized = got.shape[0]
            assert torch.equal(got, torch.tensor(expected)[:sized, :sized])
            assert got.sum() == mask.cells(total)


def test_moves_cost_what_they_carry():
    # Node 1 computes for node 0: queries there, outputs with log-sum-exp back, in float32.
    matrix = torch.zeros(12, 12, dtype=torch.bool)
    matrix[0:2, 4:8] = True
    matrix[2:4, 8:12] = True
    mask = AttnMask.from_matrix(matrix)
    plan = plan_attention(SeqLayout.contiguous(12, 3), mask, **HEADS, algorithm="tasks")
    got = {t.buffers[0].what: transfer_bytes(plan, t, 0, 2) for t in plan.forward.transfers}
    got |= {t.buffers[0].what: transfer_bytes(plan, t, 0, 2) for t in plan.backward.transfers}
    (q, kv), (d, dv) = HEADS["heads"], HEADS["head_dims"]
    rows, keys = 2, 4
    assert got == {
        "kv": keys * kv * (d + dv) * 2,
        "dkv": keys * kv * (d + dv) * 4,
        "q": rows * q * d * 2,
        "o": rows * q * (dv * 4 + 4),
        "qo": rows * q * ((d + dv + dv) * 2 + 4),
        "dq": rows * q * d * 4,
    }


def test_a_tile_of_scattered_tokens_is_one_dense_block():
    layout = SeqLayout.from_segments([[(0, 3), (8, 12)], [(3, 8), (12, 16)]])
    mask = AttnMask.window(4, 1)
    (index, other), tiles = [layout.local_index(n) for n in range(2)], Tiles(layout, mask)
    block = join_dense(tiles.blocks(0, 1))
    tile = mask.tile(index[block.q0 : block.q1], other[block.k0 : block.k1])
    assert int(tile.sum()) == block.cells == mask.matrix(16)[index][:, other].sum()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: assign_tasks({(0, 1): 1}, 2, 1), "budget: got 1, need 2 units or more"),
        (lambda: optimize_layout(AttnMask.causal(), 2), "total: got None"),
        (lambda: optimize_layout(AttnMask.causal((0, 4)), 2, 5), "documents: got 4"),
        (lambda: optimize_layout(AttnMask.causal(), 4, 8, ulysses=3), "ulysses: got 3"),
        (
            lambda: plan_attention(SeqLayout.zigzag(8, 2), AttnMask(), **HEADS, budget=4),
            'budget: got 4, need None with algorithm "ring"',
        ),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
