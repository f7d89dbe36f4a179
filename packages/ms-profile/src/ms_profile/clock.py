"""Logical time for schedules: what a run would take if operations cost what is stated.

Each rank has a clock. An operation adds its cost; a message carries the time at which it arrives,
and who receives it goes on at the later of that and its own time. The clocks of real processes that
pass the stamps along with their messages end at the exact makespan of the code that ran, however
loaded the machine is; `simulate` gets the same from lists of steps, in one process.

    clock = VirtualClock(latency=1)
    clock.compute(2, "F0")
    stamp = clock.send()                 # goes with the message: to_tensor(stamp)
    clock.receive(from_tensor(header))   # stamp of a message that came

Times are exact: integers, fractions, and floats as the binary numbers that they are. A tensor
carries a stamp as one float64 and refuses what does not fit; multiples of 1/1024, say, do.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from ms_profile.report.chrome import trace_events

__all__ = [
    "Compute",
    "Receive",
    "Send",
    "Span",
    "VirtualClock",
    "chrome_trace",
    "from_tensor",
    "makespan",
    "play",
    "simulate",
    "to_tensor",
]

Number = int | float | Fraction


@dataclass(frozen=True)
class Span:
    """One operation, or one wait for a message, of a rank; times in the unit of the costs."""

    name: str
    kind: Literal["compute", "idle"]
    begin: Fraction
    end: Fraction


class VirtualClock:
    """Logical time of one rank.

    Args:
        latency: Time that every message takes.
        per_byte: Time that each of its bytes adds.
    """

    def __init__(self, *, latency: Number = 0, per_byte: Number = 0) -> None:
        self._latency = _time("latency", latency)
        self._per_byte = _time("per_byte", per_byte)
        self._now = Fraction(0)
        self._spans: list[Span] = []

    @property
    def now(self) -> Fraction:
        """The time that has passed."""
        return self._now

    @property
    def spans(self) -> tuple[Span, ...]:
        """Operations and waits in order; together they cover the time from 0 to `now`."""
        return tuple(self._spans)

    def compute(self, cost: Number, name: str = "") -> None:
        """Runs an operation."""
        self._advance(self._now + _time("cost", cost), name, "compute")

    def send(self, nbytes: int = 0) -> Fraction:
        """Sends a message without waiting; returns when it arrives, which must travel with it."""
        return self._now + self._latency + self._per_byte * _time("nbytes", nbytes)

    def receive(self, stamp: Number, name: str = "") -> None:
        """Waits for a message, by the stamp that came with it."""
        self._advance(max(self._now, _time("stamp", stamp)), name, "idle")

    def finish(self, end: Number) -> None:
        """Waits until all ranks are done: `end` is the latest of their clocks.

        Raises:
            ValueError: this clock is past it.
        """
        if _time("end", end) < self._now:
            raise ValueError(f"the run ends at {end}, but this rank is at {self._now}")
        self._advance(_time("end", end), "", "idle")

    def _advance(self, to: Fraction, name: str, kind: Literal["compute", "idle"]) -> None:
        if to > self._now or kind == "compute":
            self._spans.append(Span(name, kind, self._now, to))
            self._now = to

    def busy(self) -> Fraction:
        """Time spent in operations."""
        return self._sum(self._spans, "compute")

    def idle(self) -> dict[Literal["warmup", "steady", "cooldown"], Fraction]:
        """Time spent waiting: before the first operation, between operations, after the last."""
        work = [place for place, span in enumerate(self._spans) if span.kind == "compute"]
        first, last = (work[0], work[-1]) if work else (len(self._spans), len(self._spans))
        return {
            "warmup": self._sum(self._spans[:first], "idle"),
            "steady": self._sum(self._spans[first:last], "idle"),
            "cooldown": self._sum(self._spans[last:], "idle"),
        }

    def as_dict(self, rank: int = 0, unit_s: float = 1.0) -> dict[str, Any]:
        """Operations and waits as an event record, like that of an EventTrace."""
        events = [
            {
                "name": span.name or span.kind,
                "kind": "wait" if span.kind == "idle" else "compute",
                "begin": float(span.begin) * unit_s,
                "end": float(span.end) * unit_s,
            }
            for span in self._spans
        ]
        return {"kind": "events", "version": 1, "rank": rank, "events": events}

    @staticmethod
    def _sum(spans: Iterable[Span], kind: str) -> Fraction:
        return sum((s.end - s.begin for s in spans if s.kind == kind), start=Fraction(0))


def to_tensor(stamp: Number) -> Tensor:
    """A stamp as a float64 tensor `[1]`, to be sent with or before the message.

    Raises:
        ValueError: a float64 cannot hold it exactly.
    """
    word = float(stamp)
    if Fraction(word) != stamp:
        raise ValueError(
            f"stamp {stamp} is not exact in a float64: choose costs that are multiples of a power "
            "of two"
        )
    return torch.tensor([word], dtype=torch.float64)


def from_tensor(word: Tensor) -> Fraction:
    """The stamp that `to_tensor` made a tensor of."""
    return Fraction(word.item())


@dataclass(frozen=True)
class Compute:
    """A step of a program: an operation of a stated cost."""

    cost: Number
    name: str = ""


@dataclass(frozen=True)
class Send:
    """A step: a message of `nbytes` to rank `to`; equal tags keep their order."""

    to: int
    tag: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class Receive:
    """A step: the next message of a tag from rank `source`."""

    source: int
    tag: str = ""


Step = Compute | Send | Receive


def play(
    program: Iterable[Step],
    clock: VirtualClock,
    send: Callable[[Send, Fraction], None],
    receive: Callable[[Receive], Number],
) -> None:
    """Runs the program of one rank.

    Args:
        program: Its steps.
        clock: Its clock.
        send: Called with a step and the stamp to pass on; must not wait for the receiver.
        receive: Called with a step; blocks until the message is there and returns its stamp.
    """
    for step in program:
        if isinstance(step, Compute):
            clock.compute(step.cost, step.name)
        elif isinstance(step, Send):
            send(step, clock.send(step.nbytes))
        else:
            clock.receive(receive(step), step.tag)


def simulate(
    programs: Sequence[Sequence[Step]], *, latency: Number = 0, per_byte: Number = 0
) -> tuple[VirtualClock, ...]:
    """Runs the programs of all ranks in this process; returns their clocks, all at the makespan.

    Args:
        programs: Steps of every rank.
        latency: Time that every message takes.
        per_byte: Time that each of its bytes adds.

    Raises:
        RuntimeError: every rank that is not done waits for a message that nobody sends.
    """
    clocks = tuple(VirtualClock(latency=latency, per_byte=per_byte) for _ in programs)
    mail: defaultdict[tuple[int, int, str], deque[Fraction]] = defaultdict(deque)
    at = [0] * len(programs)

    def ready(rank: int) -> bool:
        if at[rank] == len(programs[rank]):
            return False
        step = programs[rank][at[rank]]
        return not isinstance(step, Receive) or bool(mail[step.source, rank, step.tag])

    def run(rank: int) -> None:
        play(
            [programs[rank][at[rank]]],
            clocks[rank],
            send=lambda step, stamp: mail[rank, step.to, step.tag].append(stamp),
            receive=lambda step: mail[step.source, rank, step.tag].popleft(),
        )
        at[rank] += 1

    while able := [rank for rank in range(len(programs)) if ready(rank)]:
        for rank in able:
            while ready(rank):
                run(rank)
    stuck = {
        rank: program[at[rank]] for rank, program in enumerate(programs) if program[at[rank] :]
    }
    if stuck:
        raise RuntimeError(f"deadlock: {', '.join(f'rank {r} at {s}' for r, s in stuck.items())}")
    end = makespan(clocks)
    for clock in clocks:
        clock.finish(end)
    return clocks


def makespan(clocks: Iterable[VirtualClock]) -> Fraction:
    """When the last rank is done."""
    return max((clock.now for clock in clocks), default=Fraction(0))


def chrome_trace(
    clocks: Mapping[int, VirtualClock] | Sequence[VirtualClock], unit_s: float = 1e-3
) -> dict[str, Any]:
    """The operations of all ranks in the Chrome trace format, to be written as JSON.

    Args:
        clocks: Clock of every rank.
        unit_s: Seconds that one unit of cost is drawn as.
    """
    ranks = clocks.items() if isinstance(clocks, Mapping) else enumerate(clocks)
    events = trace_events([clock.as_dict(rank, unit_s) for rank, clock in ranks])
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _time(name: str, value: Number) -> Fraction:
    if not isinstance(value, int | float | Fraction):
        raise TypeError(f"{name} is a {type(value).__name__}, it must be a number")
    try:
        time = Fraction(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {value}, it must be finite") from None
    if time < 0:
        raise ValueError(f"{name} is {value}, it must not be negative")
    return time
