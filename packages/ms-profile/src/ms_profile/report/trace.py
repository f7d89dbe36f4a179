"""What one rank did while it was traced: times by kind, operators, modules, communication.

Per operator the times equal `key_averages()` of torch.profiler to the rounding of the trace. That
class has no reader for trace files, hence the sums here.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ms_profile.report import names
from ms_profile.report.intervals import Interval, Nested, clip, length, nest, subtract, union
from ms_profile.report.stream import Limits, TraceError, TraceEvents, integer, number
from ms_profile.report.summary import (
    CommTime,
    Kinds,
    MemoryPeak,
    ModuleTime,
    Operator,
    Operators,
    RankSummary,
)

_HOST = frozenset({"cpu_op", "user_annotation"})
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_MODULE = "nn.Module: "
_STEP = "ProfilerStep#"
_ITEM_BYTES = {"float": 4, "half": 2, "bfloat16": 2, "double": 8, "int": 4, "long": 8, "byte": 1}


@dataclass
class _Table:
    """Events of one thread or stream in columns, 20 bytes each."""

    begin: array[int] = field(default_factory=lambda: array("q"))
    end: array[int] = field(default_factory=lambda: array("q"))
    name: array[int] = field(default_factory=lambda: array("l"))

    def add(self, begin: int, end: int, name: int) -> None:
        self.begin.append(begin)
        self.end.append(end)
        self.name.append(name)

    def rows(self) -> list[tuple[int, int, int]]:
        return list(zip(self.begin, self.end, self.name, strict=True))


@dataclass(frozen=True)
class _Transfer:
    group: str
    op: str
    bytes: int | None


class _Collector:
    """Takes the events of a file one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[tuple[str, str]] = []  # name and category
        self._index: dict[tuple[str, str], int] = {}
        self.host: dict[Any, _Table] = defaultdict(_Table)
        self.device: dict[Any, _Table] = defaultdict(_Table)
        self.modules: dict[Any, _Table] = defaultdict(_Table)
        self.kinds: dict[int, names.Kind] = {}  # of the device's names
        self.transfers: list[tuple[_Transfer, Interval]] = []
        self.memory = 0
        self.first, self.last = 1 << 62, 0

    def _name(self, name: str, category: str) -> int:
        key = (name, category)
        if key not in self._index:
            self._index[key] = len(self.names)
            self.names.append(key)
        return self._index[key]

    def add(self, event: dict[str, Any]) -> None:
        """One event; ValueError if its numbers are not to be believed."""
        category, name, phase = event.get("cat"), event.get("name"), event.get("ph")
        if not isinstance(name, str) or not isinstance(category, str):
            return
        if phase == "i" and name == "[memory]":
            self._allocation(event.get("args"))
        if phase != "X":
            return
        begin = round(1000 * number(event.get("ts"), "ts", high=1e16))
        end = begin + round(1000 * number(event.get("dur"), "dur", high=1e12))
        row = str(event.get("pid")), str(event.get("tid"))
        if category in _HOST:
            self._span(begin, end)
            index = self._name(name, category)
            self.host[row].add(begin, end, index)
            if names.carries_out(name):
                self.transfers.append((_Transfer("", names.collective(name), None), (begin, end)))
        elif category in _DEVICE:
            self._span(begin, end)
            self._on_device(event, row, (begin, end))
        elif category == "python_function" and name.startswith(_MODULE):
            index = self._name(name.removeprefix(_MODULE), category)
            self.modules[row].add(begin, end, index)

    def _span(self, begin: int, end: int) -> None:
        self.first, self.last = min(self.first, begin), max(self.last, end)

    def _on_device(self, event: dict[str, Any], row: Any, interval: Interval) -> None:
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        name, category = event["name"], event["cat"]
        index = self._name(name, category)
        kind = names.device_kind(name, category, args)
        self.kinds[index] = kind
        self.device[row].add(*interval, index)
        if kind == "communication":
            self.transfers.append((_transfer(name, args), interval))

    def _allocation(self, args: Any) -> None:
        if isinstance(args, dict) and "Total Allocated" in args:
            # Memory from before the profiler began is freed as a negative total.
            total = integer(args["Total Allocated"], "Total Allocated", low=-(1 << 62))
            self.memory = max(self.memory, total)


def _transfer(name: str, args: dict[str, Any]) -> _Transfer:
    """What the record of a collective says, as NCCL's kernels carry it."""
    group = args.get("Process Group Description") or args.get("Process Group Name") or ""
    op = args.get("Collective name")
    item = _ITEM_BYTES.get(str(args.get("dtype", "")).lower())
    counts = [
        count
        for count in (args.get("In msg nelems"), args.get("Out msg nelems"))
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 50
    ]
    size = item * max(counts) if item and len(counts) == 2 else None
    return _Transfer(str(group), names.collective(op if isinstance(op, str) else name), size)


def read_trace(path: Path, rank: int, limits: Limits | None = None) -> RankSummary:
    """Reads a trace of torch.profiler.

    Args:
        path: A Chrome trace, packed if its name ends in .gz.
        rank: Whose it is; the file's name says it, not its content.
        limits: How much is read at most.

    Raises:
        TraceError: The file cannot be read, is no trace, or holds impossible numbers.
    """
    collector = _Collector(path)
    events = TraceEvents(path, (limits or Limits()).trace_bytes)
    for index, event in enumerate(events):
        try:
            collector.add(event)
        except ValueError as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(path, f"event {index}: {error}") from None
    if not collector.last:
        raise TraceError(path, "holds no operator: was anything run while it was recorded?")
    return _summary(collector, rank)


class _Host:
    """What the threads of the host did, from their nested events."""

    def __init__(self, collector: _Collector) -> None:
        self.steps: list[Interval] = []
        self.busy: dict[str, list[Interval]] = {"compute": [], "communication": [], "copy": []}
        self.operators: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        kinds = [names.host_kind(*name) for name in collector.names]
        for table in collector.host.values():
            for node in nest(table.rows()):
                self._add(node, kinds[node.name], *collector.names[node.name])

    def _add(self, node: Nested, kind: names.Kind, name: str, category: str) -> None:
        if name.startswith(_STEP):
            self.steps.append((node.begin, node.end))
        # The innermost event of a thread says what the thread does.
        if kind != "other":
            self.busy[kind].extend(node.own)
        if category == "cpu_op" or names.carries_out(name):
            _count(self.operators[name], length(node.own), node.end - node.begin)


def _count(row: list[int], own: int, total: int) -> None:
    row[0] += 1
    row[1] += own
    row[2] += total


def _summary(collector: _Collector, rank: int) -> RankSummary:
    host = _Host(collector)
    on_device = bool(collector.device)
    window = _window(collector, host.steps)
    busy = _device_busy(collector) if on_device else host.busy
    busy = {kind: clip(union(intervals), window) for kind, intervals in busy.items()}
    return RankSummary(
        rank=rank,
        steps=len(host.steps),
        step_s=median((e - b) / 1e9 for b, e in host.steps) if host.steps else None,
        kinds=_kinds(busy, window),
        source="device" if on_device else "host",
        operators=_operators(host.operators, "host") + _kernels(collector),
        modules=_modules(collector),
        comm_times=_comm_times(collector, busy["compute"], window),
        memory=MemoryPeak(collector.memory) if collector.memory else None,
    )


def _window(collector: _Collector, steps: list[Interval]) -> Interval:
    if not steps:
        return collector.first, collector.last
    first, last = min(begin for begin, _ in steps), max(end for _, end in steps)
    # Kernels run on after the host has left the step that started them.
    return first, max([last, *(max(table.end) for table in collector.device.values())])


def _device_busy(collector: _Collector) -> dict[str, list[Interval]]:
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


def _kernels(collector: _Collector) -> Operators:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for table in collector.device.values():
        for begin, end, index in table.rows():
            _count(sums[collector.names[index][0]], end - begin, end - begin)
    return _operators(sums, "device")


def _modules(collector: _Collector) -> tuple[ModuleTime, ...]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for table in collector.modules.values():
        for node in nest(table.rows()):
            _count(sums[collector.names[node.name][0]], length(node.own), node.end - node.begin)
    rows = [ModuleTime(name, n, own / 1e9, all_ / 1e9) for name, (n, own, all_) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.module)))


def _comm_times(
    collector: _Collector, compute: list[Interval], window: Interval
) -> tuple[CommTime, ...]:
    spans: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    sizes: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for transfer, interval in collector.transfers:
        key = transfer.group, transfer.op
        spans[key].append(interval)
        sizes[key].append(transfer.bytes)
    rows = []
    for (group, op), intervals in sorted(spans.items()):
        merged = clip(union(intervals), window)
        known = [size for size in sizes[group, op] if size is not None]
        rows.append(
            CommTime(
                group=group,
                op=op,
                calls=len(intervals),
                time_s=length(merged) / 1e9,
                exposed_s=length(subtract(merged, compute)) / 1e9,
                bytes=sum(known) if len(known) == len(intervals) else None,
            )
        )
    return tuple(rows)
