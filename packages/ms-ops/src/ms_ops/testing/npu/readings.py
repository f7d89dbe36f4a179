"""What the documents of torch_npu leave open, and which reading the emulation takes now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Readings:
    """One answer to each open question.

    Attributes:
        empty_rows: what attention returns for a query that may attend to no key, with
            inner_precise=2: "zero" (output 0, maximum -inf, sum 0) or "uniform" (the mean of all
            values, a finite maximum, the number of keys).
        merge_ends: how the update of ring attention wants the lengths of a pack: "ends" (where each
            sequence ends) or "from 0" (where each starts, and the last end).
    """

    empty_rows: str = "zero"
    merge_ends: str = "ends"


_now = [Readings()]


def reading() -> Readings:
    """Return the readings in force."""
    return _now[-1]


def push(readings: Readings) -> None:
    """Put readings in force."""
    _now.append(readings)


def pop() -> None:
    """Return to the readings before."""
    _now.pop()
