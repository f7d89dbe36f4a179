"""What a trace remembers, and the questions that a test asks of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ms_profile.tap import Phase

__all__ = ["Event", "Log", "union"]

Kind = Literal["compute", "launch", "wait", "comm", "mark"]


@dataclass(slots=True)
class Event:
    """One interval; seconds since the trace began.

    Attributes:
        name: Operator, operation, module path or mark.
        kind: compute (an operator ran), launch (a communication was issued), wait (the program
            waited for it), comm (it was under way, from its launch to its known end), mark (a
            named span or a module's forward).
        begin: Seconds.
        end: Seconds; equal to begin while the interval is open.
        group: Name of the process group of a communication.
        index: How many of this name came before, communications and others apart; the launch,
            waits and completion of one communication share it.
        phase: forward, backward, recompute or other.
        module: Path of the module that it belongs to.
    """

    name: str
    kind: Kind
    begin: float
    end: float
    group: str = ""
    index: int = 0
    phase: Phase = "other"
    module: str = ""

    @property
    def key(self) -> str:
        """Name with number."""
        return f"{self.name}#{self.index}"


@dataclass
class Log:
    """Events in order of their begin, and the edges between them in order of occurrence.

    Edges are kept as parts: names are made when asked for, not while the program runs.
    """

    events: list[Event] = field(default_factory=list)
    edges: list[tuple[str, Event, float]] = field(default_factory=list)

    def names(self) -> list[str]:
        """`edge:name#index` of every edge."""
        return [f"{edge}:{event.key}" for edge, event, _ in self.edges]

    def place(self, wanted: str) -> int:
        """Where `edge:name#index` stands in the order; `#index` may lack if there is only one.

        Raises:
            LookupError: it did not happen, or several times and no number is given.
        """
        names = self.names()
        places = [place for place, known in enumerate(names) if matches(known, wanted)]
        if len(places) == 1:
            return places[0]
        if places:
            raise LookupError(
                f"{wanted!r} happened {len(places)} times: say which, "
                f"{wanted}#0 to #{len(places) - 1}"
            )
        name = wanted.partition(":")[2]
        same = [known for known in names if matches(known.partition(":")[2], name)]
        others = sorted({event.name for _, event, _ in self.edges})
        raise LookupError(
            f"{wanted!r} did not happen; of that name: {', '.join(same) or 'nothing'}; "
            f"names in the trace: {', '.join(others)}"
        )

    def of(self, name: str, *kinds: Kind) -> list[Event]:
        """Events of a name, with or without number, of the given kinds or of any."""
        return [
            event
            for event in self.events
            if matches(event.key, name) and (not kinds or event.kind in kinds)
        ]


def matches(known: str, wanted: str) -> bool:
    """Whether a numbered name is the wanted one, or one of the wanted name."""
    return known == wanted or known.rpartition("#")[0] == wanted


def union(intervals: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds between `begin` and `end` that at least one interval covers."""
    covered, reached = 0.0, begin
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            covered += stop - start
            reached = stop
    return covered
