"""Exact search site by site: of the partial plans only those that no other beats are kept."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .bound import SCALE, TILT, Bound
from .table import Axis, Table

COMPARED = 200


class State(NamedTuple):
    """A partial plan: what it must remember of the rows, its cost, its priced cost, its picks."""

    values: tuple[int, ...]
    cost: int
    reduced: int
    link: Any  # (link of the plan without its last pick, last pick); None: no picks


class Move(NamedTuple):
    """What an option does to an axis: its number is the largest of some old ones plus something."""

    terms: tuple[tuple[int, int], ...]
    limit: int
    keep: bool


class OutOfTimeError(Exception):
    """The deadline passed before the search was complete."""


def axes(table: Table) -> int:
    """Return how many numbers a partial plan must remember at most."""
    return max((sum(axis.keep for axis in stage) for stage in table.stages), default=0)


def search(
    table: Table,
    rooms: Sequence[int],
    bound: Bound,
    ceiling: int | None,
    late: Callable[[], bool],
    width: int | None = None,
) -> tuple[int, ...] | None:
    """Return the picks of the cheapest plan, None if no plan fits.

    Args:
        table: the problem.
        rooms: bytes of every row.
        bound: prunes partial plans that cannot end at or below `ceiling`.
        ceiling: cost of a plan that is known; None: none is known.
        late: asked once an option; True ends the search with `OutOfTimeError`.
        width: keep no more partial plans a site than this, those of the least bound: then the plan
            is good, but need not be the best.
    """
    if any(room < 0 for room in rooms):
        return None
    states = [State((0,), 0, 0, None)]
    for site, stage in enumerate(table.stages):
        most = None if ceiling is None else ceiling * SCALE - bound.ahead[site + 1]
        limits = [(axis, min((rooms[row] for row in axis.rows), default=0)) for axis in stage]
        found: list[State] = []
        for option, use in enumerate(table.uses[site]):
            if late():
                raise OutOfTimeError
            added = (table.costs[site][option], bound.reduced[site][option], option)
            moves = [_move(axis, use, rooms, limit) for axis, limit in limits]
            _extend(found, states, moves, added, most)
        states = undominated(found)
        if ceiling is not None:
            states = _hopeful(states, bound, ceiling, site + 1)
        if width is not None and len(states) > width:
            states = sorted(states, key=lambda state: state.reduced)[:width]
        if not states:
            return None
    return unwind(min(states, key=lambda state: state.cost).link)


def _hopeful(states: list[State], bound: Bound, ceiling: int, site: int) -> list[State]:
    """Drop partial plans that some other prices show to end above the ceiling."""
    for tilt, ahead in bound.scaled:
        most = ceiling * SCALE * TILT - ahead[site]
        factor, less = TILT + tilt, tilt * SCALE
        states = [s for s in states if factor * s.reduced - less * s.cost <= most]
    return states


def unwind(link: Any) -> tuple[int, ...]:
    """Return the picks in the order of sites."""
    picks = []
    while link is not None:
        link, pick = link
        picks.append(pick)
    return tuple(reversed(picks))


def _move(axis: Axis, use: Sequence[int], rooms: Sequence[int], limit: int) -> Move:
    largest: dict[int, int] = {}
    for source in axis.sources:
        more = use[source.row] - rooms[source.row] * source.shifted
        largest[source.axis] = max(more, largest.get(source.axis, more))
    return Move(tuple(largest.items()), limit, axis.keep)


def _extend(
    found: list[State],
    states: Sequence[State],
    moves: Sequence[Move],
    added: tuple[int, int, int],
    most: int | None,
) -> None:
    """Add an option to every partial plan; those that fit, and can still be best, are found."""
    cost, reduced, option = added
    # Most checks compare one old number with a limit.
    checks = [(t[0][0], limit - t[0][1]) for t, limit, keep in moves if len(t) == 1]
    wide = [(terms, limit) for terms, limit, keep in moves if len(terms) > 1]
    kept = [terms for terms, _, keep in moves if keep]
    for old, spent, priced, link in states:
        if most is not None and priced + reduced > most:
            continue
        if any(old[axis] > limit for axis, limit in checks):
            continue
        if wide and any(_largest(old, terms) > limit for terms, limit in wide):
            continue
        values = tuple([_largest(old, terms) for terms in kept])
        found.append(State(values, spent + cost, priced + reduced, (link, option)))


def _largest(old: tuple[int, ...], terms: tuple[tuple[int, int], ...]) -> int:
    if len(terms) == 1:
        return old[terms[0][0]] + terms[0][1]
    return max([old[axis] + more for axis, more in terms])


def undominated(states: Sequence[State]) -> list[State]:
    """Drop every state that another beats or equals in cost and in every number."""
    if not states:
        return []
    ordered = sorted(states, key=lambda state: (state.cost, state.values))
    by_count = (_cheapest, _falling, _staircase, _tree)
    count = len(ordered[0].values)
    return by_count[count](ordered) if count < len(by_count) else _pairwise(ordered)


def _cheapest(states: Sequence[State]) -> list[State]:
    return [states[0]]


def _falling(states: Sequence[State]) -> list[State]:
    """One number: it must fall as the cost rises."""
    kept = [states[0]]
    for state in states[1:]:
        if state.values[0] < kept[-1].values[0]:
            kept.append(state)
    return kept


class Staircase:
    """The pairs that no other beats: as the first number rises, the second falls."""

    __slots__ = ("xs", "ys")

    def __init__(self) -> None:
        self.xs: list[int] = []
        self.ys: list[int] = []

    def beats(self, x: int, y: int) -> bool:
        """Whether a pair is at most this one in both numbers."""
        place = bisect_right(self.xs, x)
        return place > 0 and self.ys[place - 1] <= y

    def add(self, x: int, y: int) -> None:
        """Add a pair, and drop those that it beats."""
        if self.beats(x, y):
            return
        start = stop = bisect_left(self.xs, x)
        while stop < len(self.xs) and self.ys[stop] >= y:
            stop += 1
        self.xs[start:stop], self.ys[start:stop] = [x], [y]


def _staircase(states: Sequence[State]) -> list[State]:
    """Two numbers: what no earlier, cheaper pair beats."""
    kept: list[State] = []
    stairs = Staircase()
    for state in states:
        x, y = state.values
        if not stairs.beats(x, y):
            kept.append(state)
            stairs.add(x, y)
    return kept


def _tree(states: Sequence[State]) -> list[State]:
    """Three numbers: a staircase of two for every range of the third, as a binary indexed tree."""
    ranks = {z: i + 1 for i, z in enumerate(sorted({state.values[2] for state in states}))}
    size = len(ranks)
    stairs = [Staircase() for _ in range(size + 1)]
    kept: list[State] = []
    for state in states:
        x, y, z = state.values
        place = ranks[z]
        while place and not stairs[place].beats(x, y):
            place &= place - 1
        if place:
            continue
        kept.append(state)
        place = ranks[z]
        while place <= size:
            stairs[place].add(x, y)
            place += place & -place
    return kept


def _pairwise(states: Sequence[State]) -> list[State]:
    """More numbers: against the last ones alone, which drops less but never too much."""
    kept: list[State] = []
    for state in states:
        values = state.values
        for other in kept[: -COMPARED - 1 : -1]:
            if all(a <= b for a, b in zip(other.values, values, strict=True)):
                break
        else:
            kept.append(state)
    return kept
