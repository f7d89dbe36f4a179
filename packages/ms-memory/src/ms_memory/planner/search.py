"""The cheapest plan of a table, proven if time allows; and the smallest budget that has a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import branch, pareto
from .bound import Bound, bound
from .table import Table

MAX_AXES = 4  # beyond, partial plans are rarely comparable and branch and bound is as good
WIDTH = 200


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        picks: option of every site; None: no plan fits, or none was found in time.
        lower: no plan costs less.
        proven: nothing is cheaper (or nothing fits).
    """

    picks: tuple[int, ...] | None
    lower: int
    proven: bool


def cheapest(table: Table, rooms: Sequence[int], late: Callable[[], bool]) -> Found:
    """Search exactly; at the deadline, the best plan so far with the bound."""
    if any(room < 0 for room in rooms):
        return Found(None, 0, proven=True)
    prices = bound(table, rooms)
    best = prices.picks
    if not table.uses or (best is not None and table.cost(best) <= prices.lower):
        return Found(best, prices.lower, proven=True)
    if pareto.axes(table) > MAX_AXES:
        best, proven = branch.search(table, rooms, prices, best, late)
    else:
        best, proven = _site_by_site(table, rooms, prices, late)
    return Found(best, table.cost(best) if proven and best else prices.lower, proven)


def _site_by_site(
    table: Table, rooms: Sequence[int], prices: Bound, late: Callable[[], bool]
) -> tuple[tuple[int, ...] | None, bool]:
    best = prices.picks
    try:
        # A narrow search first: the better the plan that is known, the less the full one keeps.
        for width in (WIDTH, None):
            ceiling = None if best is None else table.cost(best)
            found = pareto.search(table, rooms, prices, ceiling, late, width)
            if found is not None:
                best = found
    except pareto.OutOfTimeError:
        return best, False
    return best, True


def least_budget(table: Table, host_budget: int | None) -> int:
    """Return the smallest budget of bytes at which a plan exists, exactly."""
    free = Table(table.floor, table.uses, tuple((0,) * len(row) for row in table.costs), 1)
    low = max(table.floor[:-1], default=0)
    most = [sum(column) for column in zip(*map(_most, table.uses), strict=True)]
    high = max((a + b for a, b in zip(table.floor[:-1], most, strict=False)), default=low)
    plain = Bound((), free.costs, (0,) * (len(free.costs) + 1), None)
    while low < high:
        middle = (low + high) // 2
        rooms = table.rooms(middle, host_budget)
        if pareto.search(free, rooms, plain, None, lambda: False) is None:
            low = middle + 1
        else:
            high = middle
    return low


def _most(uses: Sequence[Sequence[int]]) -> list[int]:
    return [max(column) for column in zip(*uses, strict=True)]
