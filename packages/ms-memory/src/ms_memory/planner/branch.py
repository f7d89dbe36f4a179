"""Exact search by branch and bound, for problems whose rows do not reduce to a few sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .bound import SCALE, Bound
from .pareto import OutOfTimeError
from .table import Table


def search(
    table: Table,
    rooms: Sequence[int],
    bound: Bound,
    incumbent: tuple[int, ...] | None,
    late: Callable[[], bool],
) -> tuple[tuple[int, ...] | None, bool]:
    """Return the picks of the cheapest plan (None: no plan fits), and whether that is proven.

    Depth first, the options of a site by rising priced cost; a branch ends where a row is full
    or the bound says that nothing below it is cheaper than the best plan so far.
    """
    if any(room < 0 for room in rooms):
        return None, True
    run = _Run(table, rooms, bound, incumbent, late)
    try:
        run.descend(0, [0] * len(rooms), 0, 0)
    except OutOfTimeError:
        return run.best, False
    return run.best, True


class _Run:
    def __init__(
        self,
        table: Table,
        rooms: Sequence[int],
        bound: Bound,
        incumbent: tuple[int, ...] | None,
        late: Callable[[], bool],
    ) -> None:
        self.table, self.rooms, self.bound, self.late = table, rooms, bound, late
        self.best = incumbent
        self.cost = None if incumbent is None else table.cost(incumbent)
        self.picks: list[int] = []
        self.order = [sorted(range(len(row)), key=row.__getitem__) for row in bound.reduced]

    def descend(self, site: int, used: Sequence[int], cost: int, reduced: int) -> None:
        if site == len(self.order):
            if self.cost is None or cost < self.cost:
                self.best, self.cost = tuple(self.picks), cost
            return
        if self.late():
            raise OutOfTimeError
        for option in self.order[site]:
            priced = reduced + self.bound.reduced[site][option]
            least = -(-(priced + self.bound.ahead[site + 1]) // SCALE)
            if self.cost is not None and least >= self.cost:
                break  # the options that follow are dearer
            use = self.table.uses[site][option]
            now = [a + b for a, b in zip(used, use, strict=True)]
            if all(a <= room for a, room in zip(now, self.rooms, strict=True)):
                self.picks.append(option)
                self.descend(site + 1, now, cost + self.table.costs[site][option], priced)
                self.picks.pop()
