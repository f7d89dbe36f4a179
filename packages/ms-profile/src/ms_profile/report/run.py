"""Read a whole profile folder. A broken file costs its rank's part, not that of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ms_profile.report import meters
from ms_profile.report.ascend import read_results
from ms_profile.report.averages import read_averages
from ms_profile.report.folder import Folder, RankFiles, find
from ms_profile.report.stream import Limits, TraceError, load_record
from ms_profile.report.summary import (
    CommTime,
    Kinds,
    RankSummary,
    RunSummary,
    add_modules,
    add_operators,
)
from ms_profile.report.trace import read_trace

_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """A profile that was read.

    Attributes:
        summary: What it says.
        meters: Records by kind and rank, for pictures.
    """

    summary: RunSummary
    meters: dict[str, dict[int, meters.Record]] = field(default_factory=dict)


def read_run(path: str | os.PathLike[str], limits: Limits | None = None) -> Run:
    """Reads and sums up a profile.

    Args:
        path: A profile folder, the folder of a run that holds one, or a result folder of the NPU's
            profiler.
        limits: How much is read of one file at most.

    Returns:
        What could be read; files that could not are named in `summary.problems`.

    Raises:
        TraceError: No file could be read.
    """
    folder = find(path)
    reader = _Reader(folder, limits or Limits())
    ranks = [reader.rank(rank, files) for rank, files in sorted(folder.ranks.items())]
    read = tuple(rank for rank in ranks if rank is not None)
    if not read:
        raise reader.errors[0]
    summary = RunSummary(
        path=str(folder.path),
        ranks=read,
        world_size=max(reader.world_size, *(rank.world_size for rank in read)),
        missing=tuple(sorted(reader.missing)),
        problems=tuple(str(error) for error in reader.errors),
        notes=tuple(folder.notes),
    )
    return Run(summary, reader.meters)


def summarise(path: str | os.PathLike[str], limits: Limits | None = None) -> RunSummary:
    """The summary of a profile alone; see `read_run`."""
    return read_run(path, limits).summary


class _Reader:
    """Reads the files of a folder and keeps what went wrong."""

    def __init__(self, folder: Folder, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self.errors: list[TraceError] = []
        self.missing: set[int] = set()
        self.world_size = 0
        self.meters: dict[str, dict[int, meters.Record]] = {}

    def _try(self, rank: int, read: Callable[..., _T], *args: Any) -> _T | None:
        try:
            return read(*args)
        except TraceError as error:
            self.errors.append(error)
            self.missing.add(rank)
            return None

    def rank(self, rank: int, files: RankFiles) -> RankSummary | None:
        """What could be read of a rank; None if that is nothing."""
        parts = [self._window(rank, files, name) for name in {**files.traces, **files.summaries}]
        parts += [self._try(rank, read_results, p, rank, self.limits) for p in files.npu]
        read = [part for part in parts if part is not None]
        found = join(read) if read else None
        for kind, path in files.meters.items():
            record = self._try(rank, self._meter, path, kind, rank)
            if record is not None:
                self.meters.setdefault(kind, {})[rank] = record
                found = _with_meter(found or RankSummary(rank), kind, record)
        return found

    def _window(self, rank: int, files: RankFiles, name: str) -> RankSummary | None:
        """The trace of a window, or else the summary beside it."""
        found = None
        if name in files.traces:
            found = self._try(rank, read_trace, files.traces[name], rank, self.limits)
        if found is None and name in files.summaries:
            found = self._try(rank, read_averages, files.summaries[name], rank, self.limits)
        return found

    def _meter(self, path: Any, kind: str, rank: int) -> meters.Record:
        data = load_record(path, self.limits.record_bytes)
        try:
            record = meters.record(data, kind)
            if record.get("rank", rank) != rank:
                raise ValueError(f"is a record of rank {record['rank']}")
        except ValueError as error:
            raise TraceError(path, str(error)) from None
        self.world_size = max(self.world_size, record.get("world_size", 0))
        return record


def _with_meter(found: RankSummary, kind: str, data: meters.Record) -> RankSummary:
    if kind == "comm":
        return replace(found, comm_bytes=meters.comm_bytes(data))
    if kind == "memory":
        return replace(found, memory=meters.memory_peak(data))
    if kind == "flops":
        return replace(found, flops=data.get("by_module", {}))
    times = meters.event_times(data)
    return replace(
        found,
        modules=found.modules or times.modules,
        # The meter knows the groups where the trace does not.
        comm_times=found.comm_times if _has_groups(found.comm_times) else times.comm,
    )


def _has_groups(rows: Sequence[CommTime]) -> bool:
    return any(row.group for row in rows)


def join(parts: Sequence[RankSummary]) -> RankSummary:
    """Several windows of one rank as one: times and calls add up, the memory peak is the highest.

    The median step is that of the window with the most steps.
    """
    longest = max(parts, key=lambda part: part.steps)
    peaks = [part.memory for part in parts if part.memory is not None]
    return RankSummary(
        rank=longest.rank,
        world_size=max(part.world_size for part in parts),
        iterations=tuple(sorted({n for part in parts for n in part.iterations})),
        step_s=longest.step_s,
        kinds=_add_kinds([part.kinds for part in parts if part.kinds is not None]),
        source=longest.source,
        operators=add_operators([part.operators for part in parts]),
        modules=add_modules([part.modules for part in parts]),
        comm_times=_add_comm([part.comm_times for part in parts]),
        memory=max(peaks, key=lambda peak: peak.bytes) if peaks else None,
    )


def _add_kinds(parts: Sequence[Kinds]) -> Kinds | None:
    if not parts:
        return None
    names = [each.name for each in fields(Kinds)]
    return Kinds(*(sum(getattr(part, name) for part in parts) for name in names))


def _add_comm(parts: Sequence[tuple[CommTime, ...]]) -> tuple[CommTime, ...]:
    found: dict[tuple[str, str], CommTime] = {}
    for row in (row for part in parts for row in part):
        key = row.group, row.op
        found[key] = _sum_comm(found[key], row) if key in found else row
    return tuple(row for _, row in sorted(found.items()))


def _sum_comm(first: CommTime, second: CommTime) -> CommTime:
    def added(a: Any, b: Any) -> Any:
        return None if a is None or b is None else a + b

    return CommTime(
        first.group,
        first.op,
        first.calls + second.calls,
        first.time_s + second.time_s,
        added(first.exposed_s, second.exposed_s),
        added(first.bytes, second.bytes),
    )
