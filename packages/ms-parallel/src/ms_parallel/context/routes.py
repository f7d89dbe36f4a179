"""Keys and values in a ring of nodes, or in a ring of rings: who visits whom, and when.

The keys of node `o` are at node `visit(o, f)` in step f of forward; backward runs the steps
from the last to the first, so that keys and values retrace their way and start where they ended.
A ring of rings (window w) has R / w windows of w nodes: w steps inside a window, then the same in
the next. Keys enter a window from the node where they entered the one before, at the same place
of the window, and have w steps for that. Partial gradients go from visitor to visitor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .plan import Buffer, Program
from .schedule import Hop, Schedule
from .tiles import Tiles, join_full

Keep = Literal["last", "k", "kv"]
Level = Literal["ring", "inner", "outer"]
# A message that has more time than its link needs starts no earlier than so many steps before
# it is awaited, in order not to hold a receive buffer all along.
LEAD = 2


@dataclass(frozen=True)
class Ring:
    """R nodes in windows of w."""

    size: int
    window: int = 1

    def visit(self, owner: int, step: int) -> int:
        """Return the node that has the keys of `owner` in a step of forward."""
        w = self.window
        (window, place), (outer, inner) = divmod(owner, w), divmod(step, w)
        return (window + outer) % (self.size // w) * w + (place + inner) % w

    def links(self, stops: Sequence[int]) -> list[tuple[int, int, Level]]:
        """Return (from, to, level) between steps at which a piece is needed, in this order.

        Inside a window from stop to stop; from window to window between the first stops of each.
        """
        out: list[tuple[int, int, Level]] = []
        entry = stops[0]
        for a, b in pairwise(stops):
            if self.window == 1:
                out.append((a, b, "ring"))
            elif a // self.window == b // self.window:
                out.append((a, b, "inner"))
            else:
                out.append((entry, b, "outer"))
                entry = b
        return out

    def start(self, source: int, target: int, level: Level) -> int:
        """Return the step in which a message between steps `source` and `target` is posted."""
        return max(source, target - LEAD * (self.window if level == "outer" else 1))


@dataclass(frozen=True)
class Piece:
    """Rows of an owner's keys and values that travel together, and the steps that need them."""

    owner: int
    stops: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]

    def buffers(self, what: Literal["kv", "dkv"]) -> tuple[Buffer, ...]:
        """Return the buffers that hold it."""
        return tuple(Buffer(what, self.owner, start, stop) for start, stop in self.rows)


def ring_programs(
    tiles: Tiles, window: int = 1, keep: Keep = "last", pruned: bool = False
) -> tuple[Program, Program]:
    """Return the forward and the backward program of a ring.

    Args:
        tiles: what there is to compute.
        window: w, nodes of an inner ring; 1 for a plain ring.
        keep: what stays for backward. "last": a piece stays where it arrived last; "kv": also at
            all its other visitors but the last but one, which gets it from the last; "k": there
            keys only.
        pruned: pieces visit only nodes that need them; else all nodes.
    """
    ring = Ring(tiles.nodes.size, window)
    lengths = tiles.nodes.lengths
    if pruned:
        pieces = [piece for o in range(ring.size) for piece in _needed(tiles, ring, o)]
        tiles = _cut(tiles, pieces)
    else:
        everyone = tuple(range(ring.size))
        pieces = [Piece(o, everyone, ((0, n),)) for o, n in enumerate(lengths) if n]
    blocks = {
        (ring.visit(o, f), f): tiles.blocks(ring.visit(o, f), o)
        for o in range(ring.size)
        for f in range(ring.size)
    }
    if pruned:
        blocks = {at: join_full(found, axes="q") for at, found in blocks.items()}
    forward, backward = Schedule(ring.size), Schedule(ring.size)
    forward.blocks = blocks
    backward.blocks = {(n, ring.size - 1 - f): found for (n, f), found in blocks.items()}
    for piece in pieces:
        _forward(forward, ring, piece, keep)
        _backward(backward, ring, piece, keep)
    return forward.program(), backward.program()


def _forward(schedule: Schedule, ring: Ring, piece: Piece, keep: Keep) -> None:
    buffers = piece.buffers("kv")
    until = {f: f for f in piece.stops}
    for source, target, level in ring.links(piece.stops):
        post = ring.start(source, target, level)
        ends = ring.visit(piece.owner, source), ring.visit(piece.owner, target)
        schedule.hops.append(Hop(*ends, post, target, buffers, level))
        until[source] = max(until[source], target - 1)
    for f in piece.stops[:-1]:
        at = ring.visit(piece.owner, f), until[f]
        if keep == "last" or f == piece.stops[-2]:
            schedule.free[at] += buffers
        elif keep == "k":
            schedule.free_v[at] += buffers


def _backward(schedule: Schedule, ring: Ring, piece: Piece, keep: Keep) -> None:
    last, keys, sums = ring.size - 1, piece.buffers("kv"), piece.buffers("dkv")
    stops = [last - f for f in reversed(piece.stops)]
    node = {t: ring.visit(piece.owner, last - t) for t in stops}
    until = {t: t for t in stops}
    for source, target, level in ring.links(stops):
        if keep == "kv" and target != stops[1]:
            continue
        key: Literal["", "v"] = "v" if keep == "k" and target != stops[1] else ""
        # Home at once: one node may be the last of many, and the owner has room for its own.
        post = source if target == last else ring.start(source, target, level)
        hop = Hop(node[source], node[target], post, target, keys, level, key)
        schedule.hops.append(hop)
        until[source] = max(until[source], target - 1)
    for t in stops:
        schedule.free[node[t], until[t]] += keys
    for a, b in pairwise(stops):
        inner: Level = "inner" if a // ring.window == b // ring.window else "outer"
        level = "ring" if ring.window == 1 else inner
        schedule.hops.append(Hop(node[a], node[b], a + 1, b, sums, level, after=True))
        schedule.free[node[a], b] += sums


def _needed(tiles: Tiles, ring: Ring, owner: int) -> list[Piece]:
    """Cut an owner's rows by the set of steps that need them."""
    needs = [
        (b.k0, b.k1, f)
        for f in range(1, ring.size)
        for b in tiles.blocks(ring.visit(owner, f), owner)
    ]
    length = tiles.nodes.length(owner)
    ends: dict[int, list[int]] = {0: [], length: []}
    for start, stop, f in needs:
        ends.setdefault(start, []).append(f)
        ends.setdefault(stop, []).append(-f)
    count = [0] * ring.size
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for at, after in pairwise(sorted(ends)):
        for f in ends[at]:
            count[abs(f)] += 1 if f > 0 else -1
        stops = (0, *(f for f in range(1, ring.size) if count[f]))
        same = rows.setdefault(stops, [])
        if same and same[-1][1] == at:
            same[-1] = same[-1][0], after
        else:
            same.append((at, after))
    return [Piece(owner, stops, tuple(parts)) for stops, parts in rows.items()]


def _cut(tiles: Tiles, pieces: Iterable[Piece]) -> Tiles:
    """Cut the tiles where pieces begin, so that the keys of a block lie in one piece."""
    cuts = set()
    for piece in pieces:
        begins = [start for start, _ in piece.rows]
        for row, start, stop in tiles.nodes.segments(piece.owner):
            cuts |= {start + at - row for at in begins if row < at < row + stop - start}
    return Tiles(tiles.nodes, tiles.mask, sorted(cuts))
