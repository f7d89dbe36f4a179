"""Which steps are traced: plain arithmetic on iteration numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["Compat", "Phase", "Schedule"]

Compat = Literal["megatron", "mindspeed"]
Phase = Literal["skip", "warmup", "record"]


@dataclass(frozen=True)
class Schedule:
    """The window `[start, stop)` of traced iterations.

    Attributes:
        start: first traced iteration.
        stop: the iteration after the last traced one.
        warmup: iterations before the window during which the profiler runs and throws away what it
            sees, so that its own start-up is not in the trace.
        compat: what the numbers count. `megatron`: printed iterations, 1 for the first of the job,
            whatever a resumed run starts with; 10 and 12 trace the printed iterations 10 and 11.
            `mindspeed`: calls to skip since the process began, the older reading; 10 and 12 trace
            the printed iterations 11 and 12 of a new run, others after a resume.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is out of range.
    """

    start: int
    stop: int
    warmup: int = 1
    compat: Compat = "megatron"

    def __post_init__(self) -> None:
        for name in ("start", "stop", "warmup"):
            _check_count(name, getattr(self, name))
        if self.stop <= self.start:
            raise ValueError(
                f"stop={self.stop} must be greater than start={self.start}: the window is"
                f" [start, stop), so stop={self.start + 1} traces one iteration"
            )
        if self.compat not in get_args(Compat):
            raise ValueError(f"compat must be 'megatron' or 'mindspeed', got {self.compat!r}")

    def window(self, first: int = 1) -> range:
        """The traced iterations, by their printed numbers.

        Args:
            first: number of the first iteration of this process; above 1 after a resume.
        """
        shift = first if self.compat == "mindspeed" else 0
        return range(self.start + shift, self.stop + shift)

    def phase(self, iteration: int, first: int = 1) -> Phase:
        """What the profiler does in an iteration.

        Args:
            iteration: its printed number.
            first: number of the first iteration of this process.
        """
        window = self.window(first)
        if iteration in window:
            return "record"
        return "warmup" if window.start - self.warmup <= iteration < window.start else "skip"


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
