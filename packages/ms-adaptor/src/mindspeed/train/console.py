"""What a person sees: the progress line, the final table, messages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mindspeed.train.metrics import StepRow, Summary

_PLAIN_LINES = 10


def size(number: float) -> str:
    """Bytes for people: three digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"


def decimal(value: float | None) -> str:
    """A loss for people."""
    return "-" if value is None else f"{value:.4f}"


class Display:
    """One progress line for each level on a terminal; about ten lines in all elsewhere.

    Args:
        levels: the levels that train.
        start: steps done before.
        total: step at which training ends.
        console: where to write.
    """

    def __init__(
        self, levels: Sequence[int], start: int, total: int, console: Console | None = None
    ) -> None:
        self.console = console or Console(stderr=False, soft_wrap=not sys.stdout.isatty())
        self._total = total
        self._begin = 0.0
        self._steps = -1
        self._steps_in_all = len(levels) * (total - start)
        self._progress = Progress(
            TextColumn("level {task.fields[level]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._tasks = {
            level: self._progress.add_task("", total=total, completed=start, level=level, facts="")
            for level in levels
        }
        self._live = self.console.is_terminal

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._progress.stop()

    def note(self, text: str) -> None:
        """One line above the progress."""
        self.console.print(text, markup=False, highlight=False)

    def step(self, row: StepRow) -> None:
        """Shows a finished step."""
        self._steps += 1
        self._begin = self._begin or time.monotonic()
        facts = (
            f"loss {decimal(row.loss)}  {row.tokens_per_s:,.0f} tokens/s  "
            f"memory {size(row.peak_bytes)}"
        )
        if self._live:
            self._progress.update(self._tasks[row.level], completed=row.step, facts=facts)
            return
        every = max(1, self._total // _PLAIN_LINES)
        if row.step % every == 0 or row.step in (1, self._total):
            self.note(
                f"level {row.level}  step {row.step}/{self._total}  {facts}  "
                f"left {self._time_left():.0f} s"
            )

    def _time_left(self) -> float:
        # Counted from the first step on, which pays for memory that later ones reuse.
        spent = time.monotonic() - self._begin
        return spent / max(self._steps, 1) * (self._steps_in_all - self._steps - 1)


# Of the step that was measured.
_MEASURED: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("TFLOP of a step", lambda m: f"{m['model_flops'] / 1e12:.4g}"),
    ("recomputed", lambda m: f"{m['hardware_flops'] / max(m['model_flops'], 1) - 1:.1%}"),
    ("saved for backward, per rank", lambda m: size(m["saved_bytes"])),
    ("live tensors at their peak, per rank", lambda m: size(m["tensor_bytes"])),
    ("sent in a step, per rank", lambda m: f"{size(m['sent_bytes'])} in {m['sends']} calls"),
)


def _of_step(show: Callable[[Mapping[str, Any]], str], summary: Summary) -> str:
    return "-" if summary.measured is None else show(summary.measured)


def print_summaries(console: Console, summaries: Mapping[int, Summary]) -> None:
    """The final table: one column a level, one row a fact."""
    table = Table(title="Training, same seed and data", title_justify="left")
    table.add_column("")
    for level in summaries:
        table.add_column(f"level {level}", justify="right")
    rows: tuple[tuple[str, Callable[[Summary], str]], ...] = (
        ("steps", lambda s: str(s.steps)),
        ("first loss", lambda s: decimal(s.first_loss)),
        ("last loss", lambda s: decimal(s.last_loss)),
        ("validation loss", lambda s: decimal(s.valid_loss)),
        ("median step time", lambda s: f"{s.median_step_time_s * 1000:,.0f} ms"),
        ("tokens/s", lambda s: f"{s.tokens_per_s:,.0f}"),
        ("TFLOP/s per rank", lambda s: f"{s.tflops_per_rank:.3g}" if s.tflops_per_rank else "-"),
        *((title, partial(_of_step, show)) for title, show in _MEASURED),
        ("peak memory of a rank's process", lambda s: size(s.peak_bytes)),
    )
    if any(summary.speed_up for summary in summaries.values()):
        rows += (("speed against level 0", lambda s: f"x{s.speed_up or 1:.2f}"),)
    for title, show in rows:
        table.add_row(title, *(show(summary) for summary in summaries.values()))
    console.print(table)
