"""Collects from the events of a trace what is summed up later, in little memory."""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import Any

from ms_profile.report import names
from ms_profile.report.intervals import Interval
from ms_profile.report.stream import integer, number

_HOST = frozenset({"cpu_op", "user_annotation"})
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_MODULE = "nn.Module: "
_ITEM_BYTES = {"float": 4, "half": 2, "bfloat16": 2, "double": 8, "int": 4, "long": 8, "byte": 1}


@dataclass
class Table:
    """Events of one thread or stream in columns, 24 bytes each."""

    begin: array[int] = field(default_factory=lambda: array("q"))
    end: array[int] = field(default_factory=lambda: array("q"))
    name: array[int] = field(default_factory=lambda: array("l"))

    def add(self, begin: int, end: int, name: int) -> None:
        """One event."""
        self.begin.append(begin)
        self.end.append(end)
        self.name.append(name)

    def rows(self) -> list[tuple[int, int, int]]:
        """All events."""
        return list(zip(self.begin, self.end, self.name, strict=True))


@dataclass(frozen=True)
class Transfer:
    """One communication as the trace tells it."""

    group: str
    op: str
    bytes: int | None


class Collector:
    """Takes the events of a file one by one.

    Attributes:
        names: Name and category of the events, by index.
        host: Events of the host by process and thread.
        device: Kernels and copies by device and stream.
        modules: Calls of `nn.Module` by process and thread.
        kinds: What the names of the device stand for, by index.
        transfers: Communications on the device.
        host_transfers: Communications that threads of the host carry out.
        labels: Begin, operation and group of rows that name the group of a communication.
        memory: Most bytes allocated since the profiler began.
        first: Begin of the first event.
        last: End of the last event.
    """

    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []  # name and category
        self._index: dict[tuple[str, str], int] = {}
        self.host: dict[Any, Table] = defaultdict(Table)
        self.device: dict[Any, Table] = defaultdict(Table)
        self.modules: dict[Any, Table] = defaultdict(Table)
        self.kinds: dict[int, names.Kind] = {}  # of the device's names
        self.transfers: list[tuple[Transfer, Interval]] = []
        self.host_transfers: list[tuple[Transfer, Interval]] = []
        self.labels: list[tuple[int, str, str]] = []
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
            self._on_host(name, (begin, end))
        elif category in _DEVICE:
            self._span(begin, end)
            self._on_device(event, row, (begin, end))
        elif category == "python_function" and name.startswith(_MODULE):
            index = self._name(name.removeprefix(_MODULE), category)
            self.modules[row].add(begin, end, index)

    def _on_host(self, name: str, interval: Interval) -> None:
        if names.carries_out(name):
            self.host_transfers.append((Transfer("", names.collective(name), None), interval))
        elif label := names.labelled(name):
            self.labels.append((interval[0], *label))

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


def _transfer(name: str, args: dict[str, Any]) -> Transfer:
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
    return Transfer(str(group), names.collective(op if isinstance(op, str) else name), size)


def with_groups(collector: Collector) -> list[tuple[Transfer, Interval]]:
    """The host's communications with the groups of their labels.

    A label stands where the program asks for a communication; another thread carries it out later.
    The two are matched in order: the first of one operation that begins after a label is its own.
    Gloo carries out a reduce_scatter as an all_reduce; the label says what it was.
    """
    labels: dict[str, deque[tuple[int, str, str]]] = {}
    for begin, op, group in sorted(collector.labels):
        done_as = "all_reduce" if op == "reduce_scatter" else op
        labels.setdefault(done_as, deque()).append((begin, op, group))
    found = []
    for transfer, interval in sorted(collector.host_transfers, key=lambda each: each[1]):
        waiting = labels.get(transfer.op)
        if waiting and waiting[0][0] <= interval[0]:
            _, op, group = waiting.popleft()
            transfer = replace(transfer, op=op, group=group)
        found.append((transfer, interval))
    return found
