"""What is known of a run, rank by rank: plain data that can be printed, compared, and dumped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True)
class Kinds:
    """Where the traced time of a rank went, in seconds.

    `compute_s + exposed_communication_s + exposed_copy_s + idle_s == total_s`: an instant in which
    several things run counts once, for the first of these that it is.

    Attributes:
        total_s: Length of the traced window.
        compute_s: At least one operator or kernel computes.
        communication_s: At least one communication runs.
        exposed_communication_s: Part of it in which nothing computes.
        copy_s: At least one memory copy runs.
        exposed_copy_s: Part of it in which nothing computes or communicates.
        idle_s: Nothing of these; on a trace of the host, Python and waiting.
    """

    total_s: float
    compute_s: float
    communication_s: float
    exposed_communication_s: float
    copy_s: float
    exposed_copy_s: float
    idle_s: float


@dataclass(frozen=True)
class Operator:
    """Sums over the calls of one operator or kernel; `self_s` leaves out what it calls."""

    name: str
    where: Literal["host", "device"]
    calls: int
    self_s: float
    total_s: float


Operators = tuple[Operator, ...]


@dataclass(frozen=True)
class ModuleTime:
    """Time in a module; `self_s` leaves out the modules inside it."""

    module: str
    calls: int
    self_s: float
    total_s: float


@dataclass(frozen=True)
class CommTime:
    """Time of one kind of communication in one group, from a trace.

    Attributes:
        group: Empty where the trace does not say it, as with gloo.
        op: For instance `all_reduce`.
        calls: How many.
        time_s: In which at least one of them runs.
        exposed_s: Part of it in which nothing computes, None where that is not known.
        bytes: Of the full buffers, None where the trace does not say it.
    """

    group: str
    op: str
    calls: int
    time_s: float
    exposed_s: float | None
    bytes: int | None = None


@dataclass(frozen=True)
class CommBytes:
    """Calls and bytes of one kind of communication in one group, from a communication meter."""

    group: str
    op: str
    calls: int
    bytes: int
    wire_bytes: int


@dataclass(frozen=True)
class MemoryPeak:
    """The most memory held at one time, and where that was, if known."""

    bytes: int
    module: str = ""
    phase: str = ""
    op: str = ""


@dataclass(frozen=True)
class RankSummary:
    """One rank.

    Attributes:
        rank: Its number.
        world_size: Ranks of the run, 0 where no file says it.
        iterations: Numbers of the traced steps; empty where the trace does not say it.
        step_s: Median length of a step.
        kinds: Where the time went, None without a trace.
        source: What the times are of: kernels on the device, or operators on the host.
        operators: Most self time first.
        modules: Most self time first.
        comm_times: By group and operation, from the trace.
        comm_bytes: By group and operation, from the meter.
        memory: Peak.
        flops: Per module path and phase.
    """

    rank: int
    world_size: int = 0
    iterations: tuple[int, ...] = ()
    step_s: float | None = None
    kinds: Kinds | None = None
    source: str = ""
    operators: Operators = ()
    modules: tuple[ModuleTime, ...] = ()
    comm_times: tuple[CommTime, ...] = ()
    comm_bytes: tuple[CommBytes, ...] = ()
    memory: MemoryPeak | None = None
    flops: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps were traced, 0 where the trace does not say it."""
        return len(self.iterations)


@dataclass(frozen=True)
class RunSummary:
    """All ranks of a run.

    Attributes:
        path: The folder.
        ranks: Those that could be read, by number.
        world_size: Ranks of the run, 0 if no file says it.
        missing: Ranks with files of which at least one could not be read.
        problems: One line for each file that could not be read.
        notes: What else the reader should know.
    """

    path: str
    ranks: tuple[RankSummary, ...]
    world_size: int = 0
    missing: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON-able data."""
        return {"kind": "run", "version": 1, **asdict(self)}


def add_operators(parts: Sequence[Operators]) -> Operators:
    """Sums by name and place; most self time first."""
    sums: dict[tuple[str, Any], list[float]] = {}
    for row in (row for part in parts for row in part):
        found = sums.setdefault((row.name, row.where), [0, 0.0, 0.0])
        for i, value in enumerate((row.calls, row.self_s, row.total_s)):
            found[i] += value
    rows = [Operator(name, where, int(n), s, t) for (name, where), (n, s, t) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.name)))


def add_modules(parts: Sequence[tuple[ModuleTime, ...]]) -> tuple[ModuleTime, ...]:
    """Sums by module; most self time first."""
    sums: dict[str, list[float]] = {}
    for row in (row for part in parts for row in part):
        found = sums.setdefault(row.module, [0, 0.0, 0.0])
        for i, value in enumerate((row.calls, row.self_s, row.total_s)):
            found[i] += value
    rows = [ModuleTime(name, int(n), s, t) for name, (n, s, t) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.module)))


@dataclass(frozen=True)
class Spread:
    """One figure over the ranks.

    Attributes:
        median: Of all ranks.
        slowest: The largest.
        rank: Which rank has that.
        spread: Largest minus smallest.
    """

    median: float
    slowest: float
    rank: int
    spread: float


def spread(values: Mapping[int, float]) -> Spread:
    """Median, largest and range of one figure per rank."""
    rank = max(values, key=lambda r: (values[r], -r))
    largest = values[rank]
    return Spread(median(values.values()), largest, rank, largest - min(values.values()))


def over_ranks(run: RunSummary) -> dict[str, Spread]:
    """Spread over the ranks of the step time and of each kind of time."""
    figures: dict[str, dict[int, float]] = {}
    for rank in run.ranks:
        if rank.step_s is not None:
            figures.setdefault("step_s", {})[rank.rank] = rank.step_s
        if rank.kinds is not None:
            for name, value in asdict(rank.kinds).items():
                figures.setdefault(name, {})[rank.rank] = value
    return {name: spread(values) for name, values in figures.items()}
