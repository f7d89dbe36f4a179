"""Proof that a plan computes the whole attention once and that its data is where it is needed.

Plain Python over the plan alone: it runs the programs with sets of intervals for buffers. It
knows nothing of how plans are made.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import pairwise

from .mask import band_cells
from .plan import AttnPlan, Block, Program, Transfer
from .proof_data import check_data, expect


class PlanError(AssertionError):
    """A plan that is wrong: not what the user asked for, but a fault of the planner."""


def verify(plan: AttnPlan) -> None:
    """Raise PlanError unless the plan is right.

    Every place has the key and value heads of its query heads, and every query head is at one
    place; every pair that the mask allows is computed exactly once, forward and backward, and no
    other; every message is posted by both ends in the same step and awaited once, later; ends of
    a pair post in the same order; what is sent or read is there and not freed or overwritten
    before; the partial gradients of every key reach its owner, each once.
    """
    try:
        check_nodes(plan)
        for name in ("forward", "backward"):
            program: Program = getattr(plan, name)
            check_shape(plan, program)
            check_blocks(plan, program)
            check_messages(program)
        check_data(plan)
    except AssertionError as error:
        raise PlanError(f"{plan.algorithm} plan: {error}") from error


def check_nodes(plan: AttnPlan) -> None:
    """Nodes are the ranks that exchange heads, and places have the heads they attend with."""
    expect(plan.nodes == plan.layout.grouped(plan.ulysses), "nodes are not those of the layout")
    heads = plan.heads
    expect(len(heads.q) == len(heads.kv) == plan.ulysses, "heads without a place")
    ends = [0, *(b for _, b in heads.q)]
    expect(all(a == end for (a, _), end in zip(heads.q, ends, strict=False)), "query heads")
    expect(ends == sorted(ends), "query heads")
    group, rest = divmod(heads.q_heads, heads.kv_heads)
    expect(rest == 0, "{} query heads, {} of keys", heads.q_heads, heads.kv_heads)
    for place, ((a, b), (c, d)) in enumerate(zip(heads.q, heads.kv, strict=True)):
        read = range(a // group, -(-b // group)) if a < b else range(c, c)
        expect(read == range(c, d), "place {} has key heads {}, reads {}", place, (c, d), read)


def check_shape(plan: AttnPlan, program: Program) -> None:
    """Every node has as many steps."""
    steps = {len(steps) for steps in program.steps}
    expect(len(program.steps) == plan.nodes.size, "a program without steps for every node")
    expect(len(steps) == 1, "nodes with {} steps", sorted(steps))


def check_blocks(plan: AttnPlan, program: Program) -> None:
    """Blocks are true to the mask, do not overlap, and are together all of it."""
    rectangles = []
    cells = 0
    for steps in program.steps:
        for step in steps:
            for block in step.blocks:
                check_block(plan, block)
                rows, keys = block.q1 - block.q0, block.k1 - block.k0
                corner = block.q_pos, block.k_pos
                rectangles.append((corner[0], corner[0] + rows, corner[1], corner[1] + keys))
                cells += block.cells
    check_disjoint(rectangles)
    total = plan.mask.cells(plan.layout.total)
    expect(cells == total, "blocks have {} pairs, the mask has {}", cells, total)


def check_block(plan: AttnPlan, block: Block) -> None:
    """Rows and keys are where the layout has them, and are seen as `kind` says."""
    rows, keys = block.q1 - block.q0, block.k1 - block.k0
    expect(rows > 0 and keys > 0, "an empty {}", block)
    expect(holds(plan, block.q_owner, block.q0, block.q1, block.q_pos), "queries of {}", block)
    expect(holds(plan, block.kv_owner, block.k0, block.k1, block.k_pos), "keys of {}", block)
    expect(cells_of(plan, block) == block.cells, "cells of {}", block)
    if block.kind == "full":
        expect(block.cells == rows * keys, "kind of {}", block)
    elif block.kind == "causal":
        square = rows == keys and block.cells == rows * (rows + 1) // 2
        expect(square and block.q_pos == block.k_pos, "kind of {}", block)
        if plan.mask.dense is not None:
            at = slice(block.q_pos, block.q_pos + rows)
            tile = plan.mask.dense.matrix[at, at]
            expect(int(tile.tril().sum()) == block.cells, "kind of {}", block)
        else:
            expect(plan.mask.right == 0, "kind of {}", block)
    else:
        dense = plan.mask.dense is not None
        expect(dense == (block.kind == "dense"), "kind of {}", block)
        expect(dense or whole_document(plan, block), "documents of {}", block)


def holds(plan: AttnPlan, node: int, start: int, stop: int, position: int) -> bool:
    """Whether local rows [start, stop) of a node are the tokens from `position` on."""
    return any(
        row <= start and stop <= row + b - a and position == a + start - row
        for row, a, b in plan.nodes.segments(node)
    )


def cells_of(plan: AttnPlan, block: Block) -> int:
    """Count the pairs of a block's rectangle that the mask allows."""
    q0, k0 = block.q_pos, block.k_pos
    q1, k1 = q0 + block.q1 - block.q0, k0 + block.k1 - block.k0
    mask = plan.mask
    if mask.dense is not None:
        return int(mask.dense.matrix[q0:q1, k0:k1].sum())
    ends = mask.documents or (0, plan.layout.total)
    first = bisect_right(ends, max(q0, k0)) - 1
    last = bisect_left(ends, min(q1, k1))
    return sum(
        band_cells(max(q0, a), min(q1, b), max(k0, a), min(k1, b), mask.left, mask.right)
        for a, b in pairwise(ends[max(0, first) : last + 1])
    )


def whole_document(plan: AttnPlan, block: Block) -> bool:
    """Whether all queries and keys of a block are of one document."""
    ends = plan.mask.documents
    if not ends:
        return True
    at = bisect_right(ends, min(block.q_pos, block.k_pos))
    last = max(block.q_pos + block.q1 - block.q0, block.k_pos + block.k1 - block.k0)
    return last <= ends[at]


def check_disjoint(rectangles: list[tuple[int, int, int, int]]) -> None:
    """No two rectangles (q0, q1, k0, k1) overlap: a sweep over the queries."""
    events = [(r[0], 1, r[2], r[3]) for r in rectangles]
    events += [(r[1], 0, r[2], r[3]) for r in rectangles]
    active: list[tuple[int, int]] = []
    for row, starts, k0, k1 in sorted(events):
        at = bisect_left(active, (k0, k1))
        if not starts:
            del active[at]
            continue
        before = at > 0 and active[at - 1][1] > k0
        after = at < len(active) and active[at][0] < k1
        expect(not before and not after, f"pairs of query {row}, keys [{k0}, {k1}), twice")
        active.insert(at, (k0, k1))


def check_messages(program: Program) -> None:
    """Messages are posted at both ends in one step and one order, and awaited once, later."""
    transfers = program.transfers
    posted: dict[tuple[int, int], int] = {}
    order: dict[tuple[int, int], list[int]] = defaultdict(list)
    waited: dict[int, tuple[int, int, bool]] = {}
    for index, transfer in enumerate(transfers):
        expect(transfer.index == index, "{} is number {}", transfer, index)
        expect(transfer.src != transfer.dst, "{} to itself", transfer)
        expect(all(b.start < b.stop for b in transfer.buffers), "an empty buffer in {}", transfer)
    for node, steps in enumerate(program.steps):
        for t, step in enumerate(steps):
            expect(list(step.post) == sorted(set(step.post)), "posts of node {}, step {}", node, t)
            for index in step.post:
                transfer = transfers[index]
                expect(node in (transfer.src, transfer.dst), "node {} posts {}", node, transfer)
                expect((node, index) not in posted, "node {} posts {} twice", node, transfer)
                posted[node, index] = t
                order[node, transfer.src + transfer.dst - node].append(index)
            for late, indexes in ((False, step.wait), (True, step.wait_after)):
                for index in indexes:
                    expect(index not in waited, "{} awaited twice", transfers[index])
                    waited[index] = node, t, late
    for transfer in transfers:
        _check_times(transfer, posted, waited)
    for (a, b), sequence in order.items():
        expect(order[b, a] == sequence, "nodes {} and {} post in different orders", a, b)


def _check_times(
    transfer: Transfer,
    posted: dict[tuple[int, int], int],
    waited: dict[int, tuple[int, int, bool]],
) -> None:
    start = posted.get((transfer.src, transfer.index))
    same = start is not None and start == posted.get((transfer.dst, transfer.index))
    if start is None or not same:
        raise AssertionError(f"{transfer} is not posted at both ends in one step")
    node, t, late = waited.get(transfer.index, (-1, -1, False))
    expect(node == transfer.dst, "{} is not awaited by its receiver", transfer)
    expect(t >= start if late else t > start, "{} is awaited before it is posted", transfer)
