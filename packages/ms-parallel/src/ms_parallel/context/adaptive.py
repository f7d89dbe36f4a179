"""A layout for an irregular mask: tokens that attend alike come to one process."""

from __future__ import annotations

import torch
from torch import Tensor

from ms_ops.checks import fail

from .layout import SeqLayout
from .mask import AttnMask
from .tasks import BUDGET, assign_tasks
from .tiles import Tiles

# Directions in which tokens are told apart, and numbers of groups that are tried.
DIRECTIONS = 10
GROUPS = range(2, 9)
ROUNDS = 100


def optimize_layout(
    mask: AttnMask,
    size: int,
    total: int | None = None,
    *,
    ulysses: int = 1,
    budget: int = BUDGET,
    side: int = 256,
) -> SeqLayout:
    """Return the layout of equal shards under which algorithm "tasks" has least to do.

    The mask is seen as a matrix of `side` x `side` squares. Tokens are grouped by what they
    attend to and what attends to them: projections of rows and columns on the largest
    eigenvectors of their covariance, k-means for 2 to 8 groups; each grouping is an order of the
    tokens, to be cut in equal parts. Among these orders, the sequence as it is and its zigzag,
    the best takes the least time if every round of tasks lasts as long as its largest, to a
    twentieth of an even share; then it has the fewest tiles, the least uneven work, the fewest
    intervals. The same mask gives the same layout everywhere.

    Args:
        mask: which keys a query may attend to.
        size: number of processes, P.
        total: number of tokens; needed where neither documents nor a matrix tell it.
        ulysses: U, consecutive ranks that form a node; the nodes are what is optimized.
        budget: units a node may move in a round (`plan_attention`).
        side: squares along each side; fewer are faster, and cut the tokens in longer intervals.

    Raises:
        ValueError: a number of tokens that is missing or contradicts the mask.
    """
    if ulysses < 1 or size < 1 or size % ulysses:
        fail(ValueError, "optimize_layout", "ulysses", ulysses, f"a divisor of {size}")
    total = _total(mask, total)
    nodes = size // ulysses
    units = SeqLayout.contiguous(total, max(1, min(side, total)))
    work = coarse(mask, units)
    orders = [list(range(units.size)), *_orders(work)]
    candidates = [_sliced(units, order, nodes) for order in orders]
    candidates.append(SeqLayout.zigzag(total, nodes))
    best = min(candidates, key=lambda layout: _burden(layout, units, work, budget))
    return best.subdivided(ulysses)


def coarse(mask: AttnMask, units: SeqLayout) -> Tensor:
    """Return int64 [n, n]: pairs attended to between units, each of which is an interval."""
    n = units.size
    if mask.dense is not None:
        spans = [units.segments(u)[0][1:] for u in range(n) if units.length(u)]
        if not spans:
            return torch.zeros(n, n, dtype=torch.int64)
        rows = torch.stack([mask.dense.matrix[a:b].sum(0) for a, b in spans])
        return torch.stack([rows[:, a:b].sum(1) for a, b in spans], 1)
    tiles = Tiles(units, mask)
    out = torch.zeros(n, n, dtype=torch.int64)
    for q in range(n):
        for kv in range(n):
            out[q, kv] = sum(block.cells for block in tiles.blocks(q, kv))
    return out


def _total(mask: AttnMask, total: int | None) -> int:
    known = mask.documents[-1] if mask.documents else mask.dense.size if mask.dense else total
    if known is None:
        fail(ValueError, "optimize_layout", "total", total, "the number of tokens")
    mask.check(known if total is None else total)
    return known


def _orders(work: Tensor) -> list[list[int]]:
    """Return orders of the units, one for every number of groups."""
    seen = torch.cat((work > 0, work.t() > 0), 1).double()
    if len(seen) < 2:
        return []
    centred = seen - seen.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.t())
    points = vectors[:, -DIRECTIONS:] * values[-DIRECTIONS:].clamp_min(0).sqrt()
    orders = []
    for groups in GROUPS:
        if groups > len(seen):
            break
        labels = _k_means(points, groups)
        orders.append(sorted(range(len(seen)), key=lambda i: (labels[i], i)))
    return orders


def _k_means(points: Tensor, groups: int) -> list[int]:
    """Label points, starting from those that are farthest apart; no random numbers.

    Groups are numbered by their first point. Signs of eigenvectors do not matter: distances do
    not change with them.
    """
    chosen = [int(points.square().sum(1).argmax())]
    while len(chosen) < groups:
        nearest = torch.cdist(points, points[chosen]).amin(1)
        chosen.append(int(nearest.argmax()))
    centres = points[chosen]
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(ROUNDS):
        for g in range(groups):
            members = points[labels == g]
            if len(members):
                centres[g] = members.mean(0)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    names: dict[int, int] = {}
    return [names.setdefault(int(label), len(names)) for label in labels]


def _sliced(units: SeqLayout, order: list[int], nodes: int) -> SeqLayout:
    """Cut the tokens in this order of units in equal parts, each then in sequence order."""
    tokens = [units.shards[i][0] for i in order if units.shards[i]]
    parts: list[list[tuple[int, int]]] = [[] for _ in range(nodes)]
    ends = [b for shard in SeqLayout.contiguous(units.total, nodes).shards for _, b in shard]
    ends += [units.total] * (nodes - len(ends))
    at = node = 0
    for start, stop in tokens:
        while start < stop:
            while at == ends[node]:
                node += 1
            step = min(stop - start, ends[node] - at)
            parts[node].append((start, start + step))
            start, at = start + step, at + step
    return SeqLayout.from_segments(sorted(part) for part in parts)


def _burden(layout: SeqLayout, units: SeqLayout, work: Tensor, budget: int) -> tuple[int, ...]:
    """Return what to minimize: time, tiles, spread of work, intervals.

    Of a unit that is cut every part counts by its tokens.
    """
    size = layout.size
    share = torch.zeros(units.size, size, dtype=torch.float64)
    ends = torch.tensor(units.lengths).cumsum(0)
    for node in range(size):
        held = torch.bincount(
            torch.searchsorted(ends, layout.local_index(node), right=True), minlength=units.size
        )
        share[:, node] = held / torch.tensor(units.lengths).clamp_min(1)
    counted = (share.t() @ work.double() @ share).ceil().long().tolist()
    cells = {(q, kv): n for q, row in enumerate(counted) for kv, n in enumerate(row) if n}
    tasks = assign_tasks(cells, size, budget)
    busy = [0] * size
    for task in tasks:
        busy[task.at] += cells[task.q, task.kv]
    longest: dict[int, int] = {}
    for task in tasks:
        longest[task.round] = max(longest.get(task.round, 0), cells[task.q, task.kv])
    time = 20 * size * sum(longest.values()) // max(1, sum(busy))
    spread = sum((size * n - sum(busy)) ** 2 for n in busy)
    return time, len(cells), spread, sum(map(len, layout.shards))
