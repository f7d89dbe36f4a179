"""A lower bound of every completion of a plan, and a good plan to begin with.

Rows are priced: a plan pays for the bytes that it uses and gets back what the room is worth. At
any prices the cheapest choice of every site, each by itself, costs at most what the best plan
costs. Prices are integers, scaled, so that the bound is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .table import Table

SCALE = 1 << 40  # prices are in units of cost / SCALE
MAX_PRICED_ROWS = 6
HALVINGS = 24


@dataclass(frozen=True)
class Bound:
    """Prices and what follows from them.

    Attributes:
        prices: (row, price) of the priced rows.
        reduced: `reduced[site][option]`: cost x SCALE plus the price of the bytes used.
        ahead: `ahead[i]`: the least that sites i, i + 1, ... add, less what the rooms are worth.
        picks: a plan that fits; None: none was found.
    """

    prices: tuple[tuple[int, int], ...]
    reduced: tuple[tuple[int, ...], ...]
    ahead: tuple[int, ...]
    picks: tuple[int, ...] | None

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
    return Bound(best.prices, best.reduced, best.ahead, found)


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
