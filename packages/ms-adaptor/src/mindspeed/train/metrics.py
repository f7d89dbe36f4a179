"""The record of a run: one JSON object a step, and a summary for each level."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

# The first steps of a process pay for memory and code that later ones reuse.
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class StepRow:
    """One line of metrics.jsonl.

    Attributes:
        level: optimization level.
        step: 1 for the first step of the job.
        loss: mean cross entropy per token, in nats; null when not finite.
        grad_norm: norm of the gradient before clipping; null for a skipped step.
        step_time_s: wall time of the slowest rank.
        tokens_per_s: tokens of the global batch by that time.
        peak_bytes: highest memory of a rank so far.
    """

    level: int
    step: int
    loss: float | None
    grad_norm: float | None
    step_time_s: float
    tokens_per_s: float
    peak_bytes: int

    @classmethod
    def of(cls, level: int, message: Mapping[str, Any]) -> StepRow:
        """The row of a rank's step message."""
        seconds = message["step_time_s"]
        return cls(
            level=level,
            step=message["step"],
            loss=message["loss"],
            grad_norm=None if message["skipped"] else message["grad_norm"],
            step_time_s=seconds,
            tokens_per_s=message["tokens"] / seconds,
            peak_bytes=message["peak_bytes"],
        )


@dataclass(frozen=True)
class Summary:
    """What a level's training came to; times are medians without the first two steps.

    `tflops_per_rank` is the rate of the model's own FLOPs (forward and backward) in TFLOP/s.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    valid_loss: float | None
    median_step_time_s: float
    tokens_per_s: float
    peak_bytes: int
    speed_up: float | None
    tflops_per_rank: float | None
    measured: Mapping[str, Any] | None


def summarize(
    rows: Sequence[StepRow],
    valid_loss: float | None,
    speed_up: float | None,
    measured: Mapping[str, Any] | None = None,
    world_size: int = 1,
) -> Summary:
    """The summary of one level's rows, at least one of them.

    Args:
        rows: in order.
        valid_loss: the last one.
        speed_up: against the lowest level.
        measured: fields of `mindspeed.train.measure.Measured`, when a step was measured.
        world_size: ranks that share its FLOPs.
    """
    timed = rows[WARM_UP_STEPS:] or rows
    seconds = statistics.median(row.step_time_s for row in timed)
    flops = measured["model_flops"] / world_size if measured else 0
    return Summary(
        steps=rows[-1].step,
        first_loss=rows[0].loss,
        last_loss=rows[-1].loss,
        valid_loss=valid_loss,
        median_step_time_s=seconds,
        tokens_per_s=statistics.median(row.tokens_per_s for row in timed),
        peak_bytes=max(row.peak_bytes for row in rows),
        speed_up=speed_up,
        tflops_per_rank=flops / seconds / 1e12 if flops else None,
        measured=measured,
    )


def interleaved_ratio(
    base: Sequence[StepRow], other: Sequence[StepRow], segment: int
) -> float | None:
    """How many times as fast `other` is: the median over pairs of neighbouring segments.

    Args:
        base: rows of the slower level, in order.
        other: rows of the faster one, which trained in turns with it.
        segment: steps of a turn; the first turn only warms up.
    """
    ratios = []
    for start in range(segment, min(len(base), len(other)), segment):
        pair = [rows[start : start + segment] for rows in (base, other)]
        slow, fast = (statistics.median(row.step_time_s for row in rows) for rows in pair)
        ratios.append(slow / fast)
    return statistics.median(ratios) if ratios else None


class MetricsFile:
    """Writes metrics.jsonl line by line, so that a stopped run leaves a readable file.

    Args:
        path: the file; a resumed run adds to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def step(self, row: StepRow) -> None:
        """Adds one step."""
        self._write(asdict(row))

    def summary(self, level: int, summary: Summary) -> None:
        """Adds the last line of a level."""
        self._write({"level": level, "summary": asdict(summary)})

    def _write(self, value: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
