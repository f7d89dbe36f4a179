"""The planner's problem as integers: rows with room, uses that are zero for the thriftiest option.

A row is an event, or the host's memory. What a site needs at a row whatever is chosen is taken off
the row's room beforehand, so that "every row has room for what is chosen so far" is all that a
partial plan must satisfy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .problem import Problem


@dataclass(frozen=True)
class Table:
    """A multiple-choice knapsack with many rows.

    Attributes:
        floor: bytes a row needs at least, per row; the host's row is last.
        uses: `uses[site][option][row]`, bytes beyond the floor.
        costs: `costs[site][option]`: nanoseconds and, behind them, host bytes in one integer.
        unit: what one nanosecond counts in `costs`.
    """

    floor: tuple[int, ...]
    uses: tuple[tuple[tuple[int, ...], ...], ...]
    costs: tuple[tuple[int, ...], ...]
    unit: int

    @classmethod
    def of(cls, problem: Problem, *, host: bool = True) -> Table:
        """Build the table of a problem; without `host` the host's row stays empty."""
        floor = [*problem.base, 0]
        uses = []
        for site, dense in zip(problem.sites, problem.uses, strict=True):
            options = zip(dense, site.options, strict=True)
            rows = [(*use, option.host if host else 0) for use, option in options]
            least = [min(column) for column in zip(*rows, strict=True)]
            floor = [a + b for a, b in zip(floor, least, strict=True)]
            uses.append(tuple(tuple(map(int.__sub__, row, least)) for row in rows))
        unit = 1 + sum(max(o.host for o in site.options) for site in problem.sites)
        costs = tuple(tuple(o.time * unit + o.host for o in s.options) for s in problem.sites)
        return cls(tuple(floor), tuple(uses), costs, unit)

    def rooms(self, budget: int, host_budget: int | None) -> tuple[int, ...]:
        """Return the bytes of every row that choices may use; negative: no plan fits."""
        *events, host = self.floor
        return (*(budget - least for least in events), (host_budget or 0) - host)

    def used(self, picks: Sequence[int]) -> list[int]:
        """Return the bytes of every row beyond the floor."""
        rows = [uses[pick] for uses, pick in zip(self.uses, picks, strict=True)]
        return [sum(column) for column in zip(*rows, strict=True)] or [0] * len(self.floor)

    def cost(self, picks: Sequence[int]) -> int:
        """Return the cost of a plan."""
        return sum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True))

    def thinned(self) -> tuple[Table, tuple[tuple[int, ...], ...]]:
        """Return the table without options that another of their site beats in everything.

        Beside it, which options are left, site by site.
        """
        pairs = zip(self.uses, self.costs, strict=True)
        places = tuple(_unbeaten(uses, costs) for uses, costs in pairs)
        uses = tuple(tuple(u[i] for i in p) for u, p in zip(self.uses, places, strict=True))
        costs = tuple(tuple(c[i] for i in p) for c, p in zip(self.costs, places, strict=True))
        return Table(self.floor, uses, costs, self.unit), places

    def backwards(self) -> Table:
        """Return the same with the last site first."""
        return Table(self.floor, self.uses[::-1], self.costs[::-1], self.unit)

    @cached_property
    def stages(self) -> tuple[tuple[Axis, ...], ...]:
        """Return which sums must be remembered after each site: the axes."""
        return _stages(self.uses, len(self.floor))


def _unbeaten(uses: Sequence[Sequence[int]], costs: Sequence[int]) -> tuple[int, ...]:
    """Return the options that no other beats; of equal ones the first."""
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], sum(uses[i]), i)):
        mine = uses[i]
        if not any(all(a <= b for a, b in zip(uses[j], mine, strict=True)) for j in kept):
            kept.append(i)
    return tuple(sorted(kept))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a remembered sum comes from: one before the site, plus what the site uses at `row`.

    `shifted`: the sum before was kept as bytes, and is needed as bytes beyond the row's room.
    """

    axis: int
    row: int
    shifted: bool


@dataclass(frozen=True, slots=True)
class Axis:
    """A number that partial plans must remember.

    Attributes:
        sources: the number is the largest of these.
        rows: rows that it stands for, if it counts bytes (all have used as much so far).
        worst: it counts bytes beyond the room of the fullest of several rows that the remaining
            sites treat alike.
        keep: False: no remaining site touches these rows, so that it is checked and forgotten.
    """

    sources: tuple[Source, ...]
    rows: tuple[int, ...]
    worst: bool
    keep: bool


def _stages(uses: Sequence[Sequence[Sequence[int]]], rows: int) -> tuple[tuple[Axis, ...], ...]:
    """Find the axes: rows used alike so far share one, rows to be used alike share their fullest.

    In a chain of layers whose activations are held from forward to backward this leaves the sum
    of the bytes held: one axis; with several micro-batches in flight, two.
    """
    ahead = _future_classes(uses, rows)
    past = [0] * rows
    home = dict.fromkeys(range(rows), (0, False))  # row -> its axis before the site
    stages = []
    for site, options in enumerate(uses):
        columns = list(zip(*options, strict=True))
        numbers: dict[object, int] = {}
        past = [numbers.setdefault((past[r], columns[r]), len(numbers)) for r in range(rows)]
        axes, home = _axes(past, ahead[site + 1], home, columns)
        stages.append(tuple(axes))
    return tuple(stages)


def _future_classes(uses: Sequence[Sequence[Sequence[int]]], rows: int) -> list[list[int]]:
    """Number the rows after every site such that equal numbers mean: treated alike from there on.

    Number 0 means: not touched any more.
    """
    now = [0] * rows
    classes = [now]
    for options in reversed(uses):
        columns = list(zip(*options, strict=True))
        numbers: dict[object, int] = {(0, (0,) * len(options)): 0}
        now = [numbers.setdefault((now[r], columns[r]), len(numbers)) for r in range(rows)]
        classes.append(now)
    return classes[::-1]


Home = dict[int, tuple[int, bool]]


def _axes(
    past: Sequence[int], future: Sequence[int], home: Home, columns: Sequence[Sequence[int]]
) -> tuple[list[Axis], Home]:
    classes: dict[int, list[int]] = {}
    for row in home:
        classes.setdefault(future[row], []).append(row)
    same: dict[tuple[int, bool], list[int]] = {}
    axes: list[Axis] = []
    after: Home = {}
    for number, members in classes.items():
        if len({past[row] for row in members}) == 1 and not any(home[r][1] for r in members):
            same.setdefault((past[members[0]], number != 0), []).extend(members)
            continue
        if number:
            after |= {row: (len(axes), True) for row in members}
        axes.append(Axis(_sources(members, home, columns), (), True, number != 0))
    for (_, keep), members in same.items():
        if keep:
            after |= {row: (len(axes), False) for row in members}
        source = Source(home[members[0]][0], members[0], False)
        axes.append(Axis((source,), tuple(members), False, keep))
    kept = [axis.keep for axis in axes]
    places = [sum(kept[:i]) for i in range(len(axes))]
    return axes, {row: (places[axis], worst) for row, (axis, worst) in after.items()}


def _sources(
    members: Sequence[int], home: Home, columns: Sequence[Sequence[int]]
) -> tuple[Source, ...]:
    found: dict[object, Source] = {}
    for row in members:
        axis, worst = home[row]
        key = (axis, columns[row]) if worst else (axis, row)
        found.setdefault(key, Source(axis, row, not worst))
    return tuple(found.values())
