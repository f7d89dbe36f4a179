"""Attention as a list of tasks: each tile goes to the owner of its queries or of its keys.

For masks of which many tiles are empty. A tile that its queries' owner computes needs the keys
and values ("kv"); one that its keys' owner computes for another needs the queries ("q"), and
gives outputs back ("o"; backward "qo" and "dq"). Only rows that the tile needs are moved, from
owner to owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ms_ops.checks import fail

from .plan import Block, Buffer, Program, What
from .routes import Keep
from .schedule import Hop, Schedule
from .tiles import Tiles

# Units of a node's budget: both ends of a move pay. Queries go in the round of their task, what
# they give back in the next.
KV_UNITS, Q_UNITS, O_UNITS = 2, 1, 1
BUDGET = 6


@dataclass(frozen=True)
class Task:
    """One tile of the score matrix.

    Attributes:
        q: node whose queries they are.
        kv: node whose keys they are.
        at: node that computes it: `q` or `kv`.
        round: when, 0 for tiles within a node.
    """

    q: int
    kv: int
    at: int
    round: int


def assign_tasks(
    cells: Mapping[tuple[int, int], int], nodes: int, budget: int = BUDGET
) -> tuple[Task, ...]:
    """Give every tile to a node and a round, one remote tile a node and round.

    Greedy: every node takes a tile of its own queries, first the one that a plain ring would give
    it in this round, else the largest; nodes that find none take a tile of their own keys from
    the node that has most left to do, which may send queries once a round. No node spends more
    than its budget in a round.

    Args:
        cells: pairs of every tile (query node, key node) that is not empty.
        nodes: number of nodes.
        budget: units that a node may send and receive in a round: 2 for keys and values, 1 for
            queries, 1 for outputs.

    Raises:
        ValueError: a budget under 2, with which keys and values cannot move.
    """
    if budget < KV_UNITS:
        fail(ValueError, "plan_attention", "budget", budget, f"{KV_UNITS} units or more")
    rounds = _Rounds({tile: n for tile, n in cells.items() if tile[0] != tile[1]}, nodes, budget)
    tasks = [Task(q, kv, q, 0) for q, kv in sorted(cells) if q == kv]
    while rounds.left:
        tasks += rounds.next()
    return tuple(tasks)


class _Rounds:
    """The tiles that are left, and what a node may still move in the round."""

    def __init__(self, left: dict[tuple[int, int], int], nodes: int, budget: int) -> None:
        self.left, self.nodes, self.budget, self.number = left, nodes, budget, 0
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
        self.columns: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
        self.todo = [0] * nodes
        for tile in sorted(left, key=lambda tile: (-left[tile], tile)):
            self.rows[tile[0]].append(tile)
            self.columns[tile[1]].append(tile)
            self.todo[tile[0]] += left[tile]
        self.free = [budget] * nodes

    def next(self) -> list[Task]:
        """Return the tasks of a round."""
        self.number += 1
        busy, sent = set(), set()
        tasks = []
        for node in range(self.nodes):
            ring = (node, (node + self.number) % self.nodes)
            choice = [ring] if ring in self.left else []
            tile = self._take([*choice, *self.rows[node]], KV_UNITS)
            if tile is not None:
                tasks.append(Task(*tile, node, self.number))
                busy.add(node)
        helped = []
        for node in range(self.nodes):
            if node in busy:
                continue
            others = [t for t in self.columns[node] if t[0] not in sent]
            tile = self._take(sorted(others, key=lambda t: -self.todo[t[0]]), Q_UNITS)
            if tile is not None:
                helped.append(Task(*tile, node, self.number))
                sent.add(tile[0])
        self.free = [self.budget] * self.nodes
        for task in helped:
            self.free[task.q] -= O_UNITS
            self.free[task.kv] -= O_UNITS
        return tasks + helped

    def _take(self, tiles: Iterable[tuple[int, int]], units: int) -> tuple[int, int] | None:
        """Take the first tile that both its nodes can pay for."""
        for tile in tiles:
            q, kv = tile
            if min(self.free[q], self.free[kv]) < units:
                continue
            self.free[q] -= units
            self.free[kv] -= units
            self.todo[q] -= self.left.pop(tile)
            self.rows[q].remove(tile)
            self.columns[kv].remove(tile)
            return tile
        return None


def task_programs(
    tiles: Tiles, budget: int = BUDGET, keep: Keep = "last"
) -> tuple[Program, Program]:
    """Return the forward and the backward program of tasks.

    Args:
        tiles: what there is to compute.
        budget: see `assign_tasks`.
        keep: which keys and values that came from others stay for backward: "last" none, "kv"
            all, "k" the keys.
    """
    size = tiles.nodes.size
    found = {(q, kv): tiles.blocks(q, kv) for q in range(size) for kv in range(size)}
    cells = {tile: sum(b.cells for b in blocks) for tile, blocks in found.items() if blocks}
    forward, backward = Schedule(size), Schedule(size)
    for task in assign_tasks(cells, size, budget):
        blocks = found[task.q, task.kv]
        for schedule in (forward, backward):
            at = task.at, task.round
            schedule.blocks[at] = schedule.blocks.get(at, ()) + blocks
        if task.q == task.kv:
            continue
        if task.at == task.q:
            _move_keys(forward, backward, task, blocks, keep)
        else:
            _move(forward, task, _rows("q", blocks), _rows("o", blocks))
            _move(backward, task, _rows("qo", blocks), _rows("dq", blocks))
    return forward.program(), backward.program()


def _move_keys(
    forward: Schedule, backward: Schedule, task: Task, blocks: Iterable[Block], keep: Keep
) -> None:
    keys, sums = _rows("kv", blocks), _rows("dkv", blocks)
    at, t = task.at, task.round
    forward.hops.append(Hop(task.kv, at, t - 1, t, keys))
    if keep == "last":
        forward.free[at, t] += keys
    elif keep == "k":
        forward.free_v[at, t] += keys
    if keep != "kv":
        key: Literal["", "v"] = "v" if keep == "k" else ""
        backward.hops.append(Hop(task.kv, at, t - 1, t, keys, key=key))
    backward.free[at, t] += keys
    backward.hops.append(Hop(at, task.kv, t + 1, t + 1, sums, after=True))
    backward.free[at, t + 1] += sums


def _move(
    schedule: Schedule, task: Task, there: tuple[Buffer, ...], back: tuple[Buffer, ...]
) -> None:
    at, t = task.at, task.round
    schedule.hops.append(Hop(task.q, at, t - 1, t, there))
    schedule.free[at, t] += there
    schedule.hops.append(Hop(at, task.q, t + 1, t + 1, back, after=True))
    schedule.free[at, t + 1] += back


def _rows(what: What, blocks: Iterable[Block]) -> tuple[Buffer, ...]:
    """Return the rows of queries or keys that blocks of one tile use, joined."""
    keys = what in ("kv", "dkv")
    spans = sorted((b.k0, b.k1) if keys else (b.q0, b.q1) for b in blocks)
    owner = next((b.kv_owner if keys else b.q_owner for b in blocks), 0)
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return tuple(Buffer(what, owner, start, stop) for start, stop in joined)
