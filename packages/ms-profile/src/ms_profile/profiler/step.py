"""The profiler that a training loop tells its iterations to."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch.profiler import record_function

from ms_profile.files import check_writable, make_folder, write_new
from ms_profile.profiler.collection import Backend, Collection, backend_name, has_accelerator
from ms_profile.profiler.ranks import Ranks, place, traces
from ms_profile.profiler.schedule import Compat, Schedule

__all__ = ["Ready", "StepProfiler"]

Ready = Literal["trace"] | Callable[[Any], object]
VERSION = 1

_log = logging.getLogger("ms_profile")


class StepProfiler:
    """Traces the iterations of a schedule, and never disturbs the loop that it watches.

    Made by `profile` or `from_megatron`, which check everything that can be checked before the
    first iteration. What fails later is logged once; after that this object does nothing.

    Attributes:
        schedule: which iterations are traced.
        collection: what is recorded.
        rank: this rank.
        world_size: number of ranks.
        backend: "torch", "npu", or "none" where this rank is not traced.
        folder: where the files go; None where nothing is written.
        files: what has been written.
        failure: the error that ended the trace, or None.
    """

    def __init__(
        self,
        schedule: Schedule,
        collection: Collection,
        *,
        ranks: Ranks = "all",
        rank: int | None = None,
        world_size: int | None = None,
        backend: str = "auto",
        out: str | os.PathLike[str] = "./profile_dir",
        on_ready: Ready = "trace",
    ) -> None:
        if on_ready != "trace" and not callable(on_ready):
            raise TypeError(f"on_ready must be 'trace' or a function, got {on_ready!r}")
        self.schedule = schedule
        self.collection = collection
        self.rank, self.world_size = place(rank, world_size)
        chosen = backend_name(backend)
        self.backend = chosen if traces(ranks, self.rank, self.world_size) else "none"
        self._on_ready = on_ready
        self.folder: Path | None = None
        if self.backend != "none":
            # Now, and not hours later when the window has been traced.
            self.folder = make_folder(out)
            check_writable(self.folder)
        if self.backend == "torch" and not collection.cpu and not has_accelerator():
            _log.warning("there is no accelerator: the CPU is the device, its operators are traced")
        self.files: list[Path] = []
        self.failure: Exception | None = None
        self._first: int | None = None
        self._current: int | None = None
        self._began = 0.0
        self._live: Backend | None = None
        self._seconds: dict[int, float] = {}
        self._summary: dict[str, Any] | None = None
        self._done = self.backend == "none"
        self._entered = False

    @classmethod
    def from_megatron(
        cls,
        args: Any,
        *,
        compat: Compat = "megatron",
        rank: int | None = None,
        world_size: int | None = None,
        backend: str = "auto",
    ) -> StepProfiler:
        """A profiler from Megatron's arguments and the profiling flags.

        Args:
            args: holds `profile_step_start`, `profile_step_end`, `profile_ranks`, and, where they
                are not at their defaults, `profile_level` ("level0"), `profile_with_cpu`,
                `profile_with_stack`, `profile_with_memory`, `profile_record_shapes`,
                `profile_save_path`.
            compat: see `Schedule`.
            rank: this rank; the default group's by default.
            world_size: number of ranks.
            backend: as in `profile`.

        Raises:
            TypeError, ValueError: as `profile`.
        """
        level = getattr(args, "profile_level", "level0")
        if level not in ("level0", "level1", "level2"):
            raise ValueError(f"profile_level must be level0, level1 or level2, got {level!r}")
        ranks = args.profile_ranks
        collection = Collection(
            level=int(level[-1]),
            cpu=getattr(args, "profile_with_cpu", False),
            memory=getattr(args, "profile_with_memory", False),
            stack=getattr(args, "profile_with_stack", False),
            shapes=getattr(args, "profile_record_shapes", False),
        )
        return cls(
            Schedule(args.profile_step_start, args.profile_step_end, compat=compat),
            collection,
            ranks=(ranks,) if isinstance(ranks, int) else tuple(ranks),
            rank=rank,
            world_size=world_size,
            backend=backend,
            out=getattr(args, "profile_save_path", "./profile_dir"),
        )

    def step(self, iteration: int) -> None:
        """Say that `iteration` starts; the one before ends with it. Leaving the context ends it."""
        if self._current is not None:
            self.end(self._current)
        self.begin(iteration)

    def begin(self, iteration: int) -> None:
        """Say that `iteration` starts, by its number in the whole job, 1 for the first."""
        if self._done:
            return
        if self._first is None:
            self._first = iteration
        self._current = iteration
        phase = self.schedule.phase(iteration, self._first)
        if phase != "skip":
            with self._guarded():
                self._begin(iteration, phase == "record")
        elif iteration >= self.schedule.window(self._first).stop:
            self._finish()

    def end(self, iteration: int) -> None:
        """Say that `iteration` has ended."""
        self._current = None
        if self._done or iteration not in self.schedule.window(self._first or 1):
            return
        with self._guarded():
            self._end(iteration)
        if iteration + 1 >= self.schedule.window(self._first or 1).stop:
            self._finish()

    def close(self) -> None:
        """Training is over: write what was traced so far."""
        if self._current is not None:
            self.end(self._current)
        self._finish()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A named range in the trace; next to nothing outside the window."""
        if self._live is None:
            yield
            return
        with record_function(name):
            yield

    def summary(self) -> dict[str, Any] | None:
        """What the summary file holds, once the window is over; None before and on other ranks.

        Returns:
            `steps` (printed iterations), `seconds` of each, and `operators`: calls, own and total
            microseconds on host and device, bytes, and shapes if they were recorded.
        """
        return self._summary

    def __enter__(self) -> StepProfiler:
        if self._entered:
            raise RuntimeError("this profiler has had its window: make another one")
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, iteration: int, records: bool) -> None:
        if self._live is None:
            window = self.schedule.window(self._first or 1)
            live = self._make()
            active = window.stop - max(iteration, window.start)
            live.prepare(max(window.start - iteration, 0), active)
            self._live = live
        if records:
            self._live.begin(iteration)
            self._began = time.perf_counter()

    def _end(self, iteration: int) -> None:
        if self._live is None:
            return
        self._seconds[iteration] = time.perf_counter() - self._began
        self._live.end(iteration)

    def _finish(self) -> None:
        """The window is over, or training is."""
        if self._done:
            return
        with self._guarded():
            if self._seconds and self._live is not None:
                self._live.stop()
                self._write(self._live)
            else:
                self._say_why_nothing()
        if self._live is not None and not self._seconds:
            self._abandon()
        self._live = None
        self._done = True

    def _say_why_nothing(self) -> None:
        window = self.schedule.window(self._first or 1)
        seen = "no iteration ran" if self._first is None else f"training began at {self._first}"
        _log.warning(
            "nothing was traced: the window is the iterations %d to %d, and %s",
            window.start,
            window.stop - 1,
            seen if self._first is None or self._first >= window.stop else "training ended before",
        )

    def _write(self, live: Backend) -> None:
        assert self.folder is not None
        if callable(self._on_ready):
            self._on_ready(live.profiler)
        else:
            self.files.extend(live.export(self.folder, self._stem()))
        self._summary = self._summarize(live)
        name = f"{self._stem()}.summary.json"
        text = json.dumps(self._summary, indent=1) + "\n"
        self.files.append(write_new(self.folder, name, text, _number(self.files)))

    def _stem(self) -> str:
        # The steps that were traced; training may have ended inside the window.
        return f"rank{self.rank}_steps{min(self._seconds)}-{max(self._seconds) + 1}"

    def _facts(self) -> dict[str, Any]:
        window = self.schedule.window(self._first or 1)
        return {
            "version": VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "window": [window.start, window.stop],
            "level": self.collection.level,
        }

    def _summarize(self, live: Backend) -> dict[str, Any]:
        return {
            "kind": "summary",
            **self._facts(),
            "backend": live.name,
            "steps": list(self._seconds),
            "seconds": list(self._seconds.values()),
            "operators": live.operators(),
        }

    def _make(self) -> Backend:
        """The backend, whose library is first imported here."""
        if self.backend == "npu":
            from ms_profile.profiler.npu import NpuBackend

            assert self.folder is not None
            # A handler of the user's own parses, or does not.
            later = replace(self.collection, analyse="later")
            asked = later if callable(self._on_ready) else self.collection
            window = self.schedule.window(self._first or 1)
            stem = f"rank{self.rank}_steps{window.start}-{window.stop}"
            return NpuBackend(asked, self.folder, stem, self._facts())
        from ms_profile.profiler.kineto import KinetoBackend

        return KinetoBackend(self.collection, self.rank, self.world_size, self._facts())

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Inside, an error ends the trace and not the training."""
        try:
            yield
        except Exception as error:
            self.failure = error
            _log.error(
                "the profiler has failed and is off, training goes on: %s: %s",
                type(error).__name__,
                error,
            )
            self._abandon()
            self._done = True

    def _abandon(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(Exception):
                live.abandon()


def _number(files: list[Path]) -> int:
    """The number in the name of the trace, so that its summary gets the same."""
    parts = files[-1].name.split(".") if files else []
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
