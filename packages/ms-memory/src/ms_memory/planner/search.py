"""The cheapest plan of a table, proven if time allows; and the smallest budget that has a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from . import branch, pareto
from .bound import Bound, bound
from .table import Table

MAX_AXES = 4  # beyond, partial plans are rarely comparable and branch and bound is as good
WIDTHS = (50, 200)


Picks = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        picks: option of every site; None: no plan fits, or none was found in time.
        lower: no plan costs less.
        proven: nothing is cheaper (or nothing fits).
    """

    picks: Picks | None
    lower: int
    proven: bool


def cheapest(table: Table, rooms: Sequence[int], late: Callable[[], bool]) -> Found:
    """Search exactly; at the deadline, the best plan so far with the bound."""
    if any(room < 0 for room in rooms):
        return Found(None, 0, proven=True)
    thin, places = table.thinned()
    # Backwards: the last layers' own peaks come on top of what all others hold, and are decided
    # first; what is left to decide is little more than a sum.
    turned = thin.backwards()
    back = pareto.axes(turned) <= MAX_AXES
    found = _cheapest(turned if back else thin, rooms, late)
    if found.picks is None:
        return found
    chosen = found.picks[::-1] if back else found.picks
    picks = tuple(kept[pick] for kept, pick in zip(places, chosen, strict=True))
    return replace(found, picks=_left_alone(table, rooms, picks))


def _left_alone(table: Table, rooms: Sequence[int], picks: Picks) -> Picks:
    """Return a plan that costs the same, with sites as they are unplanned where there is room."""
    now, used = list(picks), table.used(picks)
    for site, (uses, costs) in enumerate(zip(table.uses, table.costs, strict=True)):
        if costs[0] > costs[now[site]]:
            continue
        pairs = zip(used, uses[now[site]], uses[0], strict=True)
        tried = [total - old + new for total, old, new in pairs]
        if all(total <= room for total, room in zip(tried, rooms, strict=True)):
            now[site], used = 0, tried
    return tuple(now)


def _cheapest(table: Table, rooms: Sequence[int], late: Callable[[], bool]) -> Found:
    prices = bound(table, rooms)
    best = prices.picks
    if not table.uses or (best is not None and table.cost(best) <= prices.lower):
        return Found(best, prices.lower, proven=True)
    if pareto.axes(table) > MAX_AXES:
        best, proven = branch.search(table, rooms, prices, best, late)
        return Found(best, table.cost(best) if proven and best else prices.lower, proven)
    return _site_by_site(table, rooms, prices, late)


def _site_by_site(
    table: Table, rooms: Sequence[int], prices: Bound, late: Callable[[], bool]
) -> Found:
    best, lower = prices.picks, prices.lower
    most = sum(max(costs) for costs in table.costs)

    def known() -> int | None:
        return None if best is None else table.cost(best)

    try:
        # A narrow search first: there is a plan soon, if not the best.
        for width in WIDTHS:
            best = _better(table, best, pareto.search(table, rooms, prices, known(), late, width))
        # What may cost little more than the bound is little: if it has no plan, the bound rises.
        more = _first_step(lower, known())
        while True:
            ceiling = known()
            if ceiling is None or lower + more < ceiling:
                ceiling = lower + more if lower + more < most else None
            found = pareto.search(table, rooms, prices, ceiling, late)
            best = _better(table, found, best)  # of equal ones what a full search found
            cost = known()
            if ceiling is None or (cost is not None and cost <= ceiling):
                return Found(best, lower if cost is None else cost, proven=True)
            lower, more = ceiling + 1, 2 * more
    except pareto.OutOfTimeError:
        return Found(best, lower, proven=False)


def _better(table: Table, old: Picks | None, new: Picks | None) -> Picks | None:
    if old is None or new is None:
        return new if old is None else old
    return new if table.cost(new) < table.cost(old) else old


def _first_step(lower: int, cost: int | None) -> int:
    return max(1, (lower >> 10) if cost is None else (cost - lower) >> 4)


def least_budget(table: Table, host_budget: int | None) -> int:
    """Return the smallest budget of bytes at which a plan exists, exactly."""
    free = Table(table.floor, table.uses, tuple((0,) * len(row) for row in table.costs), 1)
    free, _ = free.thinned()
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
