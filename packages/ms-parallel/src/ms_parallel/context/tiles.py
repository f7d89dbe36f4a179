"""Rectangles of the score matrix: what the queries of one node see of the keys of another.

Both are cut at the boundaries of ownership and of documents. Two cut pieces are then either the
same or disjoint, so that under a causal mask every rectangle is seen whole, not at all, or is a
square on the diagonal; windows and matrices make the only others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from .layout import SeqLayout
from .mask import AttnMask, Kind
from .plan import Block

# (row, start, stop): first row in the local order, and the positions.
Segment = tuple[int, int, int]


class Tiles:
    """Blocks between the nodes of a layout, computed once each.

    Args:
        nodes: the layout, each node in the order of the sequence.
        mask: what may be attended to.
        cuts: further positions at which the tokens are cut, ascending.
    """

    def __init__(self, nodes: SeqLayout, mask: AttnMask, cuts: Sequence[int] = ()) -> None:
        """Cut the tokens of every node."""
        self.nodes = nodes
        self.mask = mask
        self.documents = cuts if not mask.documents else sorted({*mask.documents, *cuts})
        self.segments = [cut(nodes.segments(n), self.documents) for n in range(nodes.size)]
        self.starts = [[segment[1] for segment in segments] for segments in self.segments]
        self.spans = [[mask.span(a, b) for _, a, b in segments] for segments in self.segments]
        structured = mask.dense is None and mask.left is None
        self.plain = structured and mask.right in (None, 0)
        self._blocks: dict[tuple[int, int], tuple[Block, ...]] = {}

    def blocks(self, q_node: int, kv_node: int) -> tuple[Block, ...]:
        """Return the blocks of one node's queries and another's keys, by first row and key."""
        key = (q_node, kv_node)
        if key not in self._blocks:
            find = self._find_plain if self.plain else self._find
            self._blocks[key] = tuple(find(q_node, kv_node))
        return self._blocks[key]

    def _find(self, q_node: int, kv_node: int) -> list[Block]:
        keys, starts = self.segments[kv_node], self.starts[kv_node]
        found = []
        queries = zip(self.segments[q_node], self.spans[q_node], strict=True)
        for (row, q0, q1), (low, high) in queries:
            first = max(0, bisect_right(starts, low) - 1)
            for at in range(first, bisect_left(starts, high)):
                column, k0, k1 = keys[at]
                seen = self.mask.rectangle(q0, q1, max(k0, low), min(k1, high))
                if seen is not None:
                    a, b, c, d, kind, cells = seen
                    rows = (row + a - q0, row + b - q0)
                    columns = (column + c - k0, column + d - k0)
                    found.append(Block(q_node, *rows, kv_node, *columns, kind, a, c, cells))
        return found

    def _find_plain(self, q_node: int, kv_node: int) -> list[Block]:
        """Find the blocks of a causal or full mask: most plans, and all that is said above."""
        keys, starts = self.segments[kv_node], self.starts[kv_node]
        found = []
        queries = zip(self.segments[q_node], self.spans[q_node], strict=True)
        for (row, q0, q1), (low, high) in queries:
            rows = q1 - q0
            for at in range(bisect_left(starts, low), bisect_left(starts, high)):
                column, k0, k1 = keys[at]
                columns = k1 - k0
                same = k0 == q0 and self.mask.right == 0
                cells = rows * (rows + 1) // 2 if same else rows * columns
                kind: Kind = "causal" if same and rows > 1 else "full"
                ends = (row, row + rows, kv_node, column, column + columns)
                found.append(Block(q_node, *ends, kind, q0, k0, cells))
        return found


def cut(segments: Sequence[Segment], at: Sequence[int]) -> tuple[Segment, ...]:
    """Cut segments at positions, which are in ascending order."""
    out = []
    for row, start, stop in segments:
        inner = at[bisect_right(at, start) : bisect_left(at, stop)]
        edges = [start, *inner, stop]
        for a, b in pairwise(edges):
            out.append((row + a - start, a, b))
    return tuple(out)


def join_full(
    blocks: Sequence[Block], *, axes: str = "qk", across_gaps: bool = False
) -> tuple[Block, ...]:
    """Join blocks that are seen whole and continue one another in rows or in keys.

    Args:
        blocks: of one node and one owner of keys.
        axes: "q", "k" or "qk": along which to join.
        across_gaps: also join where positions do not follow one another. `q_pos` and `k_pos` are
            then true of the first row and key only: not for biases or dropout by position.
    """
    for axis in axes:
        out: list[Block] = []
        for block in sorted(blocks, key=_by_keys if axis == "q" else _by_rows):
            if out and _follows(out[-1], block, axis, across_gaps):
                last = out[-1]
                cells = last.cells + block.cells
                out[-1] = replace(last, q1=block.q1, k1=block.k1, cells=cells)
            else:
                out.append(block)
        blocks = sorted(out, key=_by_rows)
    return tuple(blocks)


def join_dense(blocks: Sequence[Block]) -> Block:
    """Return one block around all blocks of a node's queries and an owner's keys.

    Its rows and keys need not follow one another in the sequence: their positions are those of the
    layout (`nodes.local_index`), its pairs what `AttnMask.tile` says of them.
    """
    first = min(blocks, key=_by_rows)
    return Block(
        first.q_owner, first.q0, max(b.q1 for b in blocks),
        first.kv_owner, min(b.k0 for b in blocks), max(b.k1 for b in blocks),
        "dense", first.q_pos, min(blocks, key=_by_keys).k_pos, sum(b.cells for b in blocks),
    )  # fmt: skip


def _by_rows(block: Block) -> tuple[int, int]:
    return block.q0, block.k0


def _by_keys(block: Block) -> tuple[int, int]:
    return block.k0, block.q0


def _follows(a: Block, b: Block, axis: str, across_gaps: bool) -> bool:
    if a.kind != "full" or b.kind != "full":
        return False
    if axis == "q":
        ends = (a.q1, a.k0, a.k1) == (b.q0, b.k0, b.k1)
        return ends and (across_gaps or a.q_pos + a.q1 - a.q0 == b.q_pos)
    ends = (a.k1, a.q0, a.q1) == (b.k0, b.q0, b.q1)
    return ends and (across_gaps or a.k_pos + a.k1 - a.k0 == b.k_pos)
