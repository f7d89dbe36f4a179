"""Exact search site by site: of the partial plans only those that no other beats are kept."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .bound import SCALE, Bound
from .table import Axis, Table


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
        if width is not None and len(states) > width:
            states = sorted(states, key=lambda state: state.reduced)[:width]
        if not states:
            return None
    return unwind(min(states, key=lambda state: state.cost).link)


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
    by_count = (_cheapest, _falling, _staircase)
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


def _staircase(states: Sequence[State]) -> list[State]:
    """Two numbers: the pairs that no earlier, cheaper pair beats form a staircase."""
    kept: list[State] = []
    xs: list[int] = []  # rise
    ys: list[int] = []  # fall
    for state in states:
        x, y = state.values
        place = bisect_right(xs, x)
        if place and ys[place - 1] <= y:
            continue
        kept.append(state)
        start = bisect_left(xs, x)
        stop = start
        while stop < len(xs) and ys[stop] >= y:
            stop += 1
        xs[start:stop], ys[start:stop] = [x], [y]
    return kept


def _pairwise(states: Sequence[State]) -> list[State]:
    kept: list[State] = []
    for state in states:
        values = state.values
        for other in reversed(kept):
            if all(a <= b for a, b in zip(other.values, values, strict=True)):
                break
        else:
            kept.append(state)
    return kept
