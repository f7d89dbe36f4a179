"""A lower bound of every completion of a plan, and a good plan to begin with.

Rows are priced: a plan pays for the bytes that it uses and gets back what the room is worth. At
any prices the cheapest choice of every site, each by itself, costs at most what the best plan
costs. Prices are integers, scaled, so that the bound is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .table import Table

SCALE = 1 << 40  # prices are in units of cost / SCALE
MAX_PRICED_ROWS = 6
HALVINGS = 24
TILT, TILTS = 64, (-24, -12, -6, -3, -1, 1, 3, 6, 12, 24)
SWEEPS, ENOUGH = 5, 1e-6
FIRST, BISECTIONS = 1 / 256, 14


@dataclass(frozen=True)
class Bound:
    """Prices and what follows from them.

    Attributes:
        prices: (row, price) of the priced rows.
        reduced: `reduced[site][option]`: cost x SCALE plus the price of the bytes used.
        ahead: `ahead[i]`: the least that sites i, i + 1, ... add, less what the rooms are worth.
        picks: a plan that fits; None: none was found.
        scaled: the same with all prices times a number: (number - 1 in units of 1 / TILT, `ahead`).
            A plan that used more bytes so far than the best one does needs higher prices, and is
            pruned earlier.
    """

    prices: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, ...], ...]
    ahead: tuple[int, ...]
    picks: tuple[int, ...] | None
    scaled: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def lower(self) -> int:
        """No plan costs less."""
        return max(0, -(-self.ahead[0] // SCALE))


def bound(table: Table, rooms: Sequence[int]) -> Bound:
    """Price the rows that bind, one after the other, as high as needed and no higher."""
    prices: dict[int, int] = {}
    found: tuple[int, ...] | None = None
    best = _priced(table, rooms, prices)
    for _ in range(MAX_PRICED_ROWS):
        picks = _cheapest(table, prices)
        used = table.used(picks)
        row = max(range(len(rooms)), key=lambda r: used[r] - rooms[r])
        if used[row] <= rooms[row]:
            found = _better(table, found, _improve(table, rooms, picks, used))
            break
        if not _price(table, rooms, prices, row):
            break
        for other in [r for r in prices if r != row]:
            _price(table, rooms, prices, other)
        now = _priced(table, rooms, prices)
        best = max(best, now, key=lambda b: b.ahead[0])
    if best.prices and (found is None or table.cost(found) > best.lower):
        found, polished = _polished(table, rooms, best, found)
        best = max(best, _priced(table, rooms, polished), key=lambda b: b.ahead[0])
    scaled = tuple((tilt, _tilted(table, rooms, best, tilt)) for tilt in TILTS if best.prices)
    return Bound(best.prices, best.reduced, best.ahead, found, scaled)


def _tilted(table: Table, rooms: Sequence[int], start: Bound, tilt: int) -> tuple[int, ...]:
    """Return `ahead` x TILT with prices times (1 + tilt / TILT)."""
    ahead = [-(TILT + tilt) * sum(price * rooms[row] for row, price in start.prices)]
    for costs, options in zip(reversed(table.costs), reversed(start.reduced), strict=True):
        priced = zip(costs, options, strict=True)
        ahead.append(
            ahead[-1]
            + min((TILT + tilt) * reduced - tilt * cost * SCALE for cost, reduced in priced)
        )
    return tuple(reversed(ahead))


def _polished(
    table: Table, rooms: Sequence[int], start: Bound, found: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, dict[int, int]]:
    """Move the prices of the rows that bind, and look for better plans on the way.

    The bound is concave in the prices, with edges where moving one price alone does not help:
    price is also moved from row to row. Floating point is good enough: any prices give a bound.
    """
    prices = {row: price / SCALE for row, price in start.prices}
    level = start.ahead[0] / SCALE
    for _ in range(SWEEPS):
        before = level
        picks, _ = _relaxed(table, rooms, prices)
        used = table.used(picks)
        over = sorted(range(len(rooms)), key=lambda row: rooms[row] - used[row])
        for row in over[: MAX_PRICED_ROWS - len(prices)]:
            if used[row] > rooms[row]:
                prices.setdefault(row, 0.0)
        for up, down in itertools.permutations([*prices, None], 2):
            level = max(level, _along(table, rooms, prices, up, down, level))
        picks, _ = _relaxed(table, rooms, {row: price * 1.0001 for row, price in prices.items()})
        used = table.used(picks)
        if all(a <= room for a, room in zip(used, rooms, strict=True)):
            found = _better(table, found, _improve(table, rooms, picks, used))
        if level - before <= level * ENOUGH:
            break
    return found, {row: round(price * SCALE) for row, price in prices.items() if price > 0}


def _along(
    table: Table,
    rooms: Sequence[int],
    prices: dict[int, float],
    up: int | None,
    down: int | None,
    level: float,
) -> float:
    """Make one row dearer and another cheaper as far as the bound rises; returns the bound."""
    old = dict(prices)

    def slope(far: float) -> float:
        if up is not None:
            prices[up] = old[up] + far
        if down is not None:
            prices[down] = max(0.0, old[down] - far)
        picks, value = _relaxed(table, rooms, prices)
        values.append((value, dict(prices)))
        rows = zip(table.uses, picks, strict=True)
        chosen = [uses[pick] for uses, pick in rows]
        rise = 0 if up is None else sum([use[up] for use in chosen]) - rooms[up]
        return rise - (0 if down is None else sum([use[down] for use in chosen]) - rooms[down])

    values: list[tuple[float, dict[int, float]]] = []
    top = max(old.values())
    most = old[down] if down is not None else 16 * top
    low, high = 0.0, min(most, top * FIRST)
    while high < most and slope(high) > 0:
        low, high = high, min(most, 4 * high)
    if (values and len(values) > 1) or (high == most and most and slope(high) > 0):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    best = max(values, key=lambda pair: pair[0], default=(level, old))
    prices.update(best[1] if best[0] > level else old)
    return max(best[0], level)


def _relaxed(
    table: Table, rooms: Sequence[int], prices: dict[int, float]
) -> tuple[list[int], float]:
    """Return every site's cheapest option by itself, and what no plan costs less than."""
    priced = list(prices.items())
    total = -sum(price * rooms[row] for row, price in priced)
    picks = []
    for costs, uses in zip(table.costs, table.uses, strict=True):
        keys = [
            cost + sum([price * use[row] for row, price in priced])
            for cost, use in zip(costs, uses, strict=True)
        ]
        least = min(keys)
        total += least
        picks.append(keys.index(least))
    return picks, total


def _cheapest(table: Table, prices: dict[int, int]) -> list[int]:
    """Return every site's cheapest option by itself; of equals the one that uses least."""
    priced = list(prices.items())
    picks = []
    for costs, uses in zip(table.costs, table.uses, strict=True):
        keys = [
            (cost * SCALE + sum(price * use[row] for row, price in priced), -cost)
            for cost, use in zip(costs, uses, strict=True)
        ]
        picks.append(min(range(len(keys)), key=keys.__getitem__))
    return picks


def _price(table: Table, rooms: Sequence[int], prices: dict[int, int], row: int) -> bool:
    """Set the lowest price at which the row has room; False: no price helps."""

    def fits(price: int) -> bool:
        prices[row] = price
        picks = _cheapest(table, prices)
        return sum(u[p][row] for u, p in zip(table.uses, picks, strict=True)) <= rooms[row]

    high = max(prices.get(row, 0), SCALE >> 20) or 1
    ceiling = (1 + sum(max(costs) for costs in table.costs)) * SCALE * 2
    while not fits(high):
        if high > ceiling:
            prices[row] = high
            return False
        high *= 16
    low = 0
    for _ in range(HALVINGS + high.bit_length() // 4):
        middle = (low + high) // 2
        if high - low <= max(1, high >> HALVINGS):
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    prices[row] = high
    return True


def _priced(table: Table, rooms: Sequence[int], prices: dict[int, int]) -> Bound:
    priced = tuple(prices.items())
    reduced = tuple(
        tuple(
            cost * SCALE + sum(price * use[row] for row, price in priced)
            for cost, use in zip(costs, uses, strict=True)
        )
        for costs, uses in zip(table.costs, table.uses, strict=True)
    )
    ahead = [-sum(price * rooms[row] for row, price in priced)]
    for options in reversed(reduced):
        ahead.append(ahead[-1] + min(options))
    return Bound(priced, reduced, tuple(reversed(ahead)), None)


def _improve(
    table: Table, rooms: Sequence[int], picks: Sequence[int], used: Sequence[int]
) -> tuple[int, ...]:
    """Take a site's cheaper options while everything still fits, the largest savings first."""
    now, sums = list(picks), list(used)
    swaps = sorted(
        (
            (cost - costs[now[site]], site, option)
            for site, costs in enumerate(table.costs)
            for option, cost in enumerate(costs)
            if cost < costs[now[site]]
        ),
    )
    for _, site, option in swaps:
        if table.costs[site][option] >= table.costs[site][now[site]]:
            continue
        old, new = table.uses[site][now[site]], table.uses[site][option]
        tried = [s - a + b for s, a, b in zip(sums, old, new, strict=True)]
        if all(s <= room for s, room in zip(tried, rooms, strict=True)):
            now[site], sums = option, tried
    return tuple(now)


def _better(table: Table, old: tuple[int, ...] | None, new: tuple[int, ...]) -> tuple[int, ...]:
    return new if old is None or table.cost(new) < table.cost(old) else old
