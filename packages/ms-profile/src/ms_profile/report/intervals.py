"""Sets of moments as sorted, disjoint intervals of integer nanoseconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Interval = tuple[int, int]

# Begin and end of an event are rounded apart, so that a child may end this much after its parent.
ROUNDING_NS = 2


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The moments in any of the intervals."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        elif end > begin:
            merged.append((begin, end))
    return merged


def subtract(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The moments of `first` that are not in `second`; both sorted and disjoint."""
    left: list[Interval] = []
    at = 0
    for begin, end in first:
        while at < len(second) and second[at][1] <= begin:
            at += 1
        here = at
        while here < len(second) and second[here][0] < end:
            if second[here][0] > begin:
                left.append((begin, second[here][0]))
            begin = max(begin, second[here][1])
            here += 1
        if begin < end:
            left.append((begin, end))
    return left


def clip(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts inside a window."""
    cut = ((max(begin, window[0]), min(end, window[1])) for begin, end in intervals)
    return [(begin, end) for begin, end in cut if begin < end]


def length(intervals: Iterable[Interval]) -> int:
    """Nanoseconds in all."""
    return sum(end - begin for begin, end in intervals)


class Cover:
    """How much of any interval is covered by disjoint ones, in logarithmic time."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self._begins = [begin for begin, _ in intervals]
        self._ends = [end for _, end in intervals]
        lengths = (end - begin for begin, end in intervals)
        self._before = [0, *accumulate(lengths)]

    def within(self, interval: Interval) -> int:
        """Covered nanoseconds of an interval."""
        return self._until(interval[1]) - self._until(interval[0])

    def outside(self, intervals: Iterable[Interval]) -> int:
        """Nanoseconds of disjoint intervals that are not covered."""
        return sum(end - begin - self.within((begin, end)) for begin, end in intervals)

    def _until(self, moment: int) -> int:
        index = bisect_right(self._begins, moment)
        if not index:
            return 0
        return self._before[index] - max(self._ends[index - 1] - moment, 0)


@dataclass(slots=True)
class Nested:
    """One event on a thread, with what it spent outside the events within it.

    Attributes:
        begin: ns.
        end: ns.
        name: Index of the name.
        own: Intervals outside nested events.
        children: How many events are nested in it, directly.
        same: The first of these, if it has ended and has the same name.
    """

    begin: int
    end: int
    name: int
    own: list[Interval] = field(default_factory=list)
    children: int = 0
    same: Nested | None = None


def nest(events: Iterable[tuple[int, int, int]]) -> Iterator[Nested]:
    """Finds what each event of one thread spent outside the events nested in it.

    An event whose only child has its name is one call with it, as torch counts: an operator that
    dispatches to another overload of itself.

    Args:
        events: (begin, end, name) of one thread, in any order. If one begins within another and
            ends after it, the time that they share is the later one's.

    Yields:
        Every event, when it ends or later.
    """
    stack: list[Nested] = []
    since = 0  # up to here the thread's time has been given away
    for begin, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while stack and stack[-1].end <= begin + ROUNDING_NS:
            since = _end(stack[-1], since)
            yield from _leave(stack)
        if stack:
            top = stack[-1]
            top.children += 1
            if begin > since:
                top.own.append((since, begin))
            if top.same is not None:
                yield top.same
                top.same = None
        since = max(since, begin) if stack else begin
        stack.append(Nested(begin, end, name))
    while stack:
        since = _end(stack[-1], since)
        yield from _leave(stack)


def _end(node: Nested, since: int) -> int:
    if node.end > since:
        node.own.append((since, node.end))
        return node.end
    return since


def _leave(stack: list[Nested]) -> Iterator[Nested]:
    """Takes the innermost event off; held back if it may turn out to be one with its parent."""
    node = stack.pop()
    if node.same is not None:
        node.own += node.same.own
        node.same = None
    if stack and stack[-1].children == 1 and stack[-1].name == node.name:
        stack[-1].same = node
    else:
        yield node
