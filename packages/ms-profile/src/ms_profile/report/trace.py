"""What one rank did while it was traced: times by kind, operators, modules, communication.

Per operator the times equal `key_averages()` of torch.profiler to the rounding of the trace. That
class has no reader for trace files, hence the sums here.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Literal

from ms_profile.report import names
from ms_profile.report.collect import Collector, with_groups
from ms_profile.report.intervals import Cover, Interval, Nested, clip, length, nest, subtract, union
from ms_profile.report.stream import Limits, TraceError, TraceEvents, integer
from ms_profile.report.summary import (
    CommTime,
    Kinds,
    MemoryPeak,
    ModuleTime,
    Operator,
    Operators,
    RankSummary,
)


def read_trace(path: Path, rank: int, limits: Limits | None = None) -> RankSummary:
    """Reads a trace of torch.profiler.

    Args:
        path: A Chrome trace, packed if its name ends in .gz.
        rank: Whose it is; the file's name says it, not its content.
        limits: How much is read at most.

    Raises:
        TraceError: The file cannot be read, is no trace, or holds impossible numbers.
    """
    collector = Collector()
    limits = limits or Limits()
    events = TraceEvents(path, limits.trace_bytes)
    for index, event in enumerate(events):
        if index >= limits.trace_events:
            raise TraceError(path, f"has more than {limits.trace_events} events; see Limits")
        try:
            collector.add(event)
        except ValueError as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(path, f"event {index}: {error}") from None
    if not collector.last:
        raise TraceError(path, "holds no operator: was anything run while it was recorded?")
    return _summary(collector, rank, _world_size(path, events.header))


def _world_size(path: Path, header: dict[str, object]) -> int:
    found = header.get("distributedInfo")
    if not isinstance(found, dict) or "world_size" not in found:
        return 0
    try:
        return integer(found["world_size"], "world_size", low=1, high=1 << 24)
    except ValueError as error:
        raise TraceError(path, str(error)) from None


_STEP = "ProfilerStep#"


class _Host:
    """What the threads of the host did, from their nested events."""

    def __init__(self, collector: Collector) -> None:
        self.steps: dict[int, Interval] = {}
        self.busy: dict[str, list[Interval]] = {"compute": [], "communication": [], "copy": []}
        self.operators: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        kinds = [names.host_kind(*name) for name in collector.names]
        for table in collector.host.values():
            for node in nest(table.rows()):
                self._add(node, kinds[node.name], *collector.names[node.name])

    def _add(self, node: Nested, kind: names.Kind, name: str, category: str) -> None:
        if name.startswith(_STEP) and name[len(_STEP) :][:18].isdecimal():
            self.steps[int(name[len(_STEP) :][:18])] = (node.begin, node.end)
        # The innermost event of a thread says what the thread does.
        if kind != "other":
            self.busy[kind].extend(node.own)
        if category == "cpu_op" or names.carries_out(name):
            _count(self.operators[name], length(node.own), node.end - node.begin)


def _count(row: list[int], own: int, total: int) -> None:
    row[0] += 1
    row[1] += own
    row[2] += total


def _summary(collector: Collector, rank: int, world_size: int) -> RankSummary:
    host = _Host(collector)
    on_device = bool(collector.device)
    steps = [host.steps[number] for number in sorted(host.steps)]
    window = _window(collector, steps)
    busy = _device_busy(collector) if on_device else host.busy
    busy = {kind: clip(union(intervals), window) for kind, intervals in busy.items()}
    return RankSummary(
        rank=rank,
        world_size=world_size,
        iterations=tuple(sorted(host.steps)),
        step_s=median((end - begin) / 1e9 for begin, end in steps) if steps else None,
        kinds=_kinds(busy, window),
        source="device" if on_device else "host",
        operators=_operators(host.operators, "host") + _kernels(collector),
        modules=_modules(collector),
        comm_times=_comm_times(collector, busy["compute"], window),
        memory=MemoryPeak(collector.memory) if collector.memory else None,
    )


def _window(collector: Collector, steps: list[Interval]) -> Interval:
    if not steps:
        return collector.first, collector.last
    first, last = min(begin for begin, _ in steps), max(end for _, end in steps)
    # Kernels run on after the host has left the step that started them.
    return first, max([last, *(max(table.end) for table in collector.device.values())])


def _device_busy(collector: Collector) -> dict[str, list[Interval]]:
    busy: dict[str, list[Interval]] = {"compute": [], "communication": [], "copy": []}
    for table in collector.device.values():
        for begin, end, name in table.rows():
            busy[collector.kinds[name]].append((begin, end))
    return busy


def _kinds(busy: dict[str, list[Interval]], window: Interval) -> Kinds:
    compute, comm, copy = busy["compute"], busy["communication"], busy["copy"]
    exposed = subtract(comm, compute)
    bare = subtract(subtract(copy, compute), comm)
    spent = length(compute) + length(exposed) + length(bare)
    total = window[1] - window[0]
    return Kinds(
        total_s=total / 1e9,
        compute_s=length(compute) / 1e9,
        communication_s=length(comm) / 1e9,
        exposed_communication_s=length(exposed) / 1e9,
        copy_s=length(copy) / 1e9,
        exposed_copy_s=length(bare) / 1e9,
        idle_s=(total - spent) / 1e9,
    )


def _operators(sums: dict[str, list[int]], where: Literal["host", "device"]) -> Operators:
    rows = [
        Operator(name, where, n, own / 1e9, all_ / 1e9) for name, (n, own, all_) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.name)))


def _kernels(collector: Collector) -> Operators:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for table in collector.device.values():
        for begin, end, index in table.rows():
            _count(sums[collector.names[index][0]], end - begin, end - begin)
    return _operators(sums, "device")


def _modules(collector: Collector) -> tuple[ModuleTime, ...]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for table in collector.modules.values():
        for node in nest(table.rows()):
            _count(sums[collector.names[node.name][0]], length(node.own), node.end - node.begin)
    rows = [ModuleTime(name, n, own / 1e9, all_ / 1e9) for name, (n, own, all_) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.module)))


def _comm_times(
    collector: Collector, compute: list[Interval], window: Interval
) -> tuple[CommTime, ...]:
    spans: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    sizes: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    # On a device the host's rows only ask for what the kernels do.
    transfers = collector.transfers if collector.device else with_groups(collector)
    for transfer, interval in transfers:
        key = transfer.group, transfer.op
        spans[key].append(interval)
        sizes[key].append(transfer.bytes)
    rows = []
    cover = Cover(compute)
    for (group, op), intervals in sorted(spans.items()):
        merged = clip(union(intervals), window)
        known = [size for size in sizes[group, op] if size is not None]
        rows.append(
            CommTime(
                group=group,
                op=op,
                calls=len(intervals),
                time_s=length(merged) / 1e9,
                exposed_s=cover.outside(merged) / 1e9,
                bytes=sum(known) if len(known) == len(intervals) else None,
            )
        )
    return tuple(rows)
