"""Running a planned job: one group of ranks for each level, in turns, with one display."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mindspeed.features.memory.planner import report as planner_report
from mindspeed.features.profile import trace
from mindspeed.patching.detect import device_type
from mindspeed.train import runs
from mindspeed.train.args import Options
from mindspeed.train.config import TrainConfig
from mindspeed.train.console import Display, print_summaries
from mindspeed.train.group import Group, RankFailure
from mindspeed.train.level import available_levels, config_for
from mindspeed.train.metrics import MetricsFile, StepRow, Summary, interleaved_ratio, summarize
from mindspeed.train.plot import plot_losses
from mindspeed.train.status import FAILED, GOOD, INTERRUPTED

# Steps of a turn when levels alternate: long enough to settle, short enough that both levels
# see the same state of the machine.
TURN = 3
# Steps between looks at the schedule of saves and validations when one level trains alone.
STRETCH = 1000


def run_job(options: Options, plan: runs.RunPlan, levels: Sequence[int]) -> int:
    """Trains every level and reports; returns the exit status of the command."""
    job = Job(options, plan, levels)
    try:
        with stop_on_interrupt(job):
            job.start()
            # Only now, when every rank has its model and its checkpoint, is anything written.
            runs.create(plan)
            job.train()
            job.finish()
    except RankFailure as failure:
        job.abandon()
        _report(failure, plan)
        return FAILED
    except KeyboardInterrupt:
        job.abandon()
        print("mindspeed train: stopped at once, nothing more was saved", file=sys.stderr)
        return INTERRUPTED
    return INTERRUPTED if job.stopping else GOOD


class Job:
    """The groups of one command, their rows, and what is shown and written.

    Args:
        options: the command line.
        plan: folders and checkpoint.
        levels: the levels that train, lowest first.
    """

    def __init__(self, options: Options, plan: runs.RunPlan, levels: Sequence[int]) -> None:
        self.options = options
        self.plan = plan
        self.levels = list(levels)
        self.stopping = False
        self.rows: dict[int, list[StepRow]] = {level: [] for level in levels}
        self.groups: dict[int, Group] = {}
        self.valid: dict[int, float | None] = dict.fromkeys(levels)
        self.measured: dict[int, dict[str, Any] | None] = dict.fromkeys(levels)
        self.display = Display(levels, plan.start, plan.config.train_iters)
        self.metrics = MetricsFile(plan.folder / runs.METRICS_FILE)
        self.saved_step: dict[int, int] = dict.fromkeys(levels, plan.start)

    def start(self) -> None:
        """Starts all ranks and waits until they have built their models."""
        config, options = self.plan.config, self.options
        self._introduce(config)
        for level in self.levels:
            self.groups[level] = Group(
                config_for(config, level, self.levels),
                options.nproc,
                self.plan.cache,
                self.plan.load,
                options.reshard,
            )
            # One group after the other: they share the cores, and the first fills the data cache.
            for _ in self.groups[level].events("ready"):
                pass

    def _introduce(self, config: TrainConfig) -> None:
        names = " and ".join(map(str, self.levels))
        text = ", ".join(config.batch.data) or "Python's reference topics"
        note = self.display.note
        note(
            f"level {names}, {self.options.nproc} processes, {config.train_iters} steps of "
            f"{config.global_batch_size(self.options.nproc)} x {config.model.seq_length} tokens "
            f"from {text}"
        )
        asked = self.options.config.optimization_level
        if asked > max(self.levels):
            reason = available_levels()[asked] or f"it adds nothing yet to level {self.levels[-1]}"
            note(f"level {asked} is not used: {reason}")
        for text in trace.notes(config.plan_values(), self.plan.start, device_type()):
            note(text)
        note(f"results in {self.plan.folder}")

    def train(self) -> None:
        """Takes all steps; levels alternate in short turns, so that the machine is fair."""
        total = self.plan.config.train_iters
        turn = TURN if len(self.levels) > 1 else STRETCH
        done = self.plan.start
        with self.display:
            while done < total and not self.stopping:
                steps = min(turn, total - done, *self._until_events(done))
                for level in self.levels:
                    self._run(level, steps)
                done += steps
                if self.stopping:
                    break
                self._between(done)

    def _until_events(self, done: int) -> Iterator[int]:
        for interval in (self.options.save_interval, self.plan.config.batch.eval_interval):
            if interval:
                yield interval - done % interval

    def _between(self, done: int) -> None:
        """What is due at a step: a validation, a save."""
        save_at, eval_at = self.options.save_interval, self.plan.config.batch.eval_interval
        for level in self.levels:
            if eval_at and done % eval_at == 0:
                loss = self._evaluate(level)
                self.display.note(f"level {level}  step {done}  validation loss {loss:.4f}")
            if save_at and done % save_at == 0:
                self._save(level)

    def _run(self, level: int, steps: int) -> None:
        group = self.groups[level]
        if self.stopping:
            return
        group.command("run", steps=steps)
        told = False
        events = group.events("idle")
        while True:
            if self.stopping and not told:
                told = True
                group.command("halt")
            message = next(events, None)
            if message is None:
                break
            if message["kind"] == "memory":
                self._planned(level, message)
            if message["kind"] == "step":
                row = StepRow.of(level, message)
                self.rows[level].append(row)
                self.metrics.step(row)
                self.display.step(row)
                self.measured[level] = message["measured"] or self.measured[level]
                for line in message["notes"]:
                    self.display.note(f"level {level}  step {row.step}  {line}")
        if told:
            for _ in group.events("idle"):
                pass

    def _planned(self, level: int, message: dict[str, Any]) -> None:
        """Shows and saves the memory plan of a pipeline stage."""
        self.display.note(message["text"])
        of_level = f"-level{level}" if len(self.levels) > 1 else ""
        name = f"{runs.MEMORY_PLAN}{of_level}-stage{message['stage']}"
        for path in planner_report.save(message["plan"], self.plan.folder, name):
            self.display.note(f"memory plan: {path}")

    def _evaluate(self, level: int) -> float:
        for message in self._ask(level, "evaluate"):
            if message["kind"] == "valid":
                self.valid[level] = message["loss"]
        loss = self.valid[level]
        return float("nan") if loss is None else loss

    def _save(self, level: int) -> None:
        folder = self.save_folder(level)
        if folder is None or self.groups[level].step == self.saved_step[level]:
            return
        asynchronous = self.options.async_save
        for _ in self._ask(level, "save", folder=str(folder), asynchronous=asynchronous):
            pass
        self.saved_step[level] = self.groups[level].step

    def _ask(self, level: int, kind: str, **content: Any) -> Iterator[dict[str, Any]]:
        self.groups[level].command(kind, **content)
        yield from self.groups[level].events("idle")

    def save_folder(self, level: int) -> Path | None:
        """Where a level's checkpoints go; levels that train together have one each."""
        if self.plan.save is None or len(self.levels) == 1:
            return self.plan.save
        return self.plan.save / f"level{level}"

    def finish(self) -> None:
        """Saves, validates, ends the ranks, and writes what remains."""
        for level, group in self.groups.items():
            self._save(level)
            if self.rows[level] and not self.stopping:
                self._evaluate(level)
            group.close()
        self.groups = {}
        summaries = self._summaries()
        for level, summary in summaries.items():
            self.metrics.summary(level, summary)
        self.metrics.close()
        self._show(summaries)

    def _summaries(self) -> dict[int, Summary]:
        base = self.rows[self.levels[0]]
        out = {}
        for level, rows in self.rows.items():
            if rows:
                compared = level != self.levels[0] and self.levels[0] == 0
                ratio = interleaved_ratio(base, rows, TURN) if compared else None
                measured = self.measured[level]
                out[level] = summarize(rows, self.valid[level], ratio, measured, self.options.nproc)
        return out

    def _show(self, summaries: dict[int, Summary]) -> None:
        note = self.display.note
        if summaries:
            print_summaries(self.display.console, summaries)
        for level in self.levels[1:]:
            ratio = summaries[level].speed_up if level in summaries else None
            if ratio is not None:
                note(
                    f"level {level} takes {ratio:.2f} times as many steps in the same time as "
                    f"level 0 (median over turns of {TURN} steps each, in one interleaved run)"
                )
        curves = self.plan.folder / runs.CURVES_FILE
        if any(self.rows.values()) and plot_losses(self.rows, curves):
            note(f"loss curves: {curves}")
        note(f"every step: {self.plan.folder / runs.METRICS_FILE}")
        saved = [step for step in self.saved_step.values() if step > self.plan.start]
        if self.stopping:
            where = f"saved at step {max(saved)}; go on with --resume" if saved else "not saved"
            note(
                f"stopped at step {max((r[-1].step for r in self.rows.values() if r), default=0)}"
                f", {where}"
            )

    def abandon(self) -> None:
        """Ends all ranks at once and keeps what was written."""
        for group in self.groups.values():
            group.kill()
        self.groups = {}
        self.metrics.close()


@contextmanager
def stop_on_interrupt(job: Job) -> Iterator[None]:
    """Inside, Ctrl-C or a termination asks the job to stop after its step; a second one ends it."""

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if job.stopping or not job.groups:
            raise KeyboardInterrupt
        job.stopping = True
        job.display.note("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(failure: RankFailure, plan: runs.RunPlan) -> None:
    from mindspeed.train.state import latest_step

    if failure.trace:
        print(failure.trace, file=sys.stderr)
    print(f"mindspeed train: {failure}; the other ranks were stopped", file=sys.stderr)
    step = latest_step(plan.save) if plan.save is not None else None
    if step is not None:
        print(
            f"the last checkpoint is of step {step}: go on with "
            f"mindspeed train --resume {plan.folder}",
            file=sys.stderr,
        )
