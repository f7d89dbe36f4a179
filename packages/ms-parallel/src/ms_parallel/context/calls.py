"""From the blocks of a step to calls of attention: as few as can be, the same for every batch.

Blocks of one form become one call on packed sequences, a lone block a plain call. A row of queries
occurs at most once in a call, so that what a call returns can be merged in one go. Where scores or
dropout depend on the position, every block is a call of its own, which knows where it lies.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ms_ops import sequence_starts

from .plan import AttnPlan, Block, Kind
from .tiles import join_full

# A matrix that cuts two nodes' tokens into more blocks becomes one call.
FEW = 3


@dataclass(frozen=True)
class Rows:
    """Rows of one owner, in this order.

    Attributes:
        owner: whose.
        ranges: intervals of its rows.
        index: int64, the rows counted from `low`; None for a single interval.
    """

    owner: int
    ranges: tuple[tuple[int, int], ...]
    index: Tensor | None = None

    @cached_property
    def low(self) -> int:
        """The first row of all."""
        return min(a for a, _ in self.ranges)

    @cached_property
    def high(self) -> int:
        """The row after the last of all."""
        return max(b for _, b in self.ranges)

    @cached_property
    def count(self) -> int:
        """Number of rows."""
        return sum(b - a for a, b in self.ranges)


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Attributes:
        kind: of the blocks it stands for.
        q: the queries.
        kv: the keys and values, owner after owner.
        cu_q: int32 [N + 1], where the packed sequences of queries start; None for one sequence.
        cu_k: likewise of the keys.
        q_pos: position of the first query; with several blocks only the difference to `k_pos`
            is the same for all.
        k_pos: position of the first key.
        tile: bool [queries, keys] of a dense block.
    """

    kind: Kind
    q: Rows
    kv: tuple[Rows, ...]
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    q_pos: int = 0
    k_pos: int = 0
    tile: Tensor | None = None


def calls_of(
    plan: AttnPlan, blocks: Sequence[Block], device: torch.device, by_position: bool
) -> Iterator[Call]:
    """Yield the calls that compute a step's blocks.

    Args:
        plan: the plan.
        blocks: of one node and step.
        device: where the lengths of packed sequences are needed.
        by_position: scores or dropout depend on positions.
    """
    if by_position:
        for block in blocks:
            yield _alone(plan, block, device)
        return
    calls, blocks = _scattered(plan, blocks, device)
    yield from calls
    forms: dict[tuple[object, ...], list[Block]] = defaultdict(list)
    for block in _triangles(blocks):
        # Bands that lie alike relative to their corner are one form; a matrix has its own rows.
        shift = block.k_pos - block.q_pos if block.kind == "band" else 0
        forms[block.q_owner, block.kind, shift].append(block)
    for (_, kind, _), found in sorted(forms.items(), key=lambda item: str(item[0])):
        if kind == "dense":
            yield from (_alone(plan, block, device) for block in found)
            continue
        for items in _rounds(_items(found)):
            yield _packed(items, device) if len(items) > 1 else _single(items[0], device)


def _scattered(
    plan: AttnPlan, blocks: Sequence[Block], device: torch.device
) -> tuple[list[Call], list[Block]]:
    """Make one call with a matrix of the many blocks that a matrix cuts two nodes' tokens into.

    Returns:
        The calls, and the blocks that are not in them.
    """
    if plan.mask.dense is None:
        return [], list(blocks)
    pairs: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        pairs[block.q_owner, block.kv_owner].append(block)
    calls, left = [], []
    for (q_owner, kv_owner), found in pairs.items():
        q = _rows(q_owner, _union((b.q0, b.q1) for b in found), device)
        k = _rows(kv_owner, _union((b.k0, b.k1) for b in found), device)
        positions = (plan.nodes.local_index(rows.owner) for rows in (q, k))
        at = [p[_all(rows)] for p, rows in zip(positions, (q, k), strict=True)]
        tile = plan.mask.tile(*at)
        if len(found) <= FEW or int(tile.sum()) != sum(b.cells for b in found):
            left += found
            continue
        calls.append(Call("dense", q, (k,), tile=tile.to(device)))
    return calls, left


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out


def _all(rows: Rows) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in rows.ranges])


def _triangles(blocks: Sequence[Block]) -> list[Block]:
    """Join what continues, whatever the positions in between.

    A triangle, the next one on the diagonal, and the square below both that is seen whole, are one
    larger triangle: a node holds its tokens in the order of the sequence.
    """
    if any(b.kind == "causal" for b in blocks):
        blocks = [replace(b, kind="causal") if _lone(b) else b for b in blocks]
    left = _join([b for b in blocks if b.kind == "full"], "k")
    out: list[Block] = [b for b in blocks if b.kind not in ("full", "causal")]
    triangles: list[Block] = []
    for block in sorted((b for b in blocks if b.kind == "causal"), key=lambda b: (b.q_owner, b.q0)):
        last = triangles[-1] if triangles else None
        square = None
        if last is not None and _follows(last, block):
            square = next((b for b in left if _closes(b, last, block)), None)
        if last is None or square is None:
            triangles.append(block)
            continue
        left.remove(square)
        cells = last.cells + block.cells + square.cells
        triangles[-1] = Block(
            last.q_owner, last.q0, block.q1, last.kv_owner, last.k0, block.k1,
            "causal", last.q_pos, last.k_pos, cells,
        )  # fmt: skip
    return [*triangles, *_join(left, "q"), *out]


def _lone(block: Block) -> bool:
    """Whether a block is one token that sees itself: the smallest triangle."""
    return block.kind == "full" and block.cells == 1 and block.q_pos == block.k_pos


def _join(blocks: Sequence[Block], axis: str) -> list[Block]:
    """Join blocks of the same nodes along one axis."""
    groups: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        groups[block.q_owner, block.kv_owner].append(block)
    found = (join_full(group, axes=axis, across_gaps=True) for group in groups.values())
    return [block for group in found for block in group]


def _follows(last: Block, block: Block) -> bool:
    same = (last.q_owner, last.kv_owner) == (block.q_owner, block.kv_owner)
    return same and (last.q1, last.k1) == (block.q0, block.k0)


def _closes(square: Block, last: Block, block: Block) -> bool:
    owners = (square.q_owner, square.kv_owner) == (last.q_owner, last.kv_owner)
    rows = (square.q0, square.q1) == (block.q0, block.q1)
    return owners and rows and (square.k0, square.k1) == (last.k0, last.k1)


# One sequence of a call: queries (owner, first, last), and intervals of keys (owner, first, last).
Item = tuple[Block, list[tuple[int, int, int]]]


def _items(blocks: Sequence[Block]) -> list[Item]:
    """Give queries that see all of several intervals of keys these as one sequence of keys."""
    items: dict[tuple[int, int, int], Item] = {}
    rest = []
    for block in blocks:
        keys = (block.kv_owner, block.k0, block.k1)
        at = (block.q_owner, block.q0, block.q1)
        if block.kind == "full" and at in items:
            items[at][1].append(keys)
        elif block.kind == "full":
            items[at] = (block, [keys])
        else:
            rest.append((block, [keys]))
    return [*items.values(), *rest]


def _rounds(items: Sequence[Item]) -> list[list[Item]]:
    """Deal the items out to calls in which every row of queries occurs once."""
    rounds: list[list[Item]] = []
    ends: list[int] = []
    for item in sorted(items, key=lambda i: (i[0].q0, i[0].q1)):
        block = item[0]
        at = next((i for i, end in enumerate(ends) if end <= block.q0), None)
        if at is None:
            rounds.append([])
            ends.append(0)
            at = len(rounds) - 1
        rounds[at].append(item)
        ends[at] = block.q1
    return rounds


def _single(item: Item, device: torch.device) -> Call:
    block, keys = item
    q = _rows(block.q_owner, [(block.q0, block.q1)], device)
    return Call(block.kind, q, _keys(keys, device), q_pos=block.q_pos, k_pos=block.k_pos)


def _packed(items: Sequence[Item], device: torch.device) -> Call:
    first = items[0][0]
    q = _rows(first.q_owner, [(b.q0, b.q1) for b, _ in items], device)
    kv = _keys([k for _, keys in items for k in keys], device)
    lengths = [b.q1 - b.q0 for b, _ in items], [sum(b - a for _, a, b in k) for _, k in items]
    cu_q, cu_k = (sequence_starts(n, device) for n in lengths)
    return Call(first.kind, q, kv, cu_q, cu_k, first.q_pos, first.k_pos)


def _alone(plan: AttnPlan, block: Block, device: torch.device) -> Call:
    tile = None
    if block.kind == "dense":
        assert plan.mask.dense is not None
        rows = slice(block.q_pos, block.q_pos + block.q1 - block.q0)
        keys = slice(block.k_pos, block.k_pos + block.k1 - block.k0)
        tile = plan.mask.dense.matrix[rows, keys].to(device)
    q = _rows(block.q_owner, [(block.q0, block.q1)], device)
    kv = _keys([(block.kv_owner, block.k0, block.k1)], device)
    return Call(block.kind, q, kv, None, None, block.q_pos, block.k_pos, tile)


def _keys(keys: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[Rows, ...]:
    groups = itertools.groupby(keys, key=lambda key: key[0])
    return tuple(_rows(owner, [(a, b) for _, a, b in group], device) for owner, group in groups)


def _rows(owner: int, ranges: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    joined: list[tuple[int, int]] = []
    for a, b in ranges:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    if len(joined) == 1:
        return Rows(owner, tuple(joined))
    low = min(a for a, _ in joined)
    index = torch.cat([torch.arange(a - low, b - low) for a, b in joined]).to(device)
    return Rows(owner, tuple(joined), index)


__all__ = ["Call", "Rows", "calls_of"]
