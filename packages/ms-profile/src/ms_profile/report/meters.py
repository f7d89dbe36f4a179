"""The records of meters, checked: from the meter itself, from its `as_dict()`, or from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ms_profile.files import make_folder, write_new
from ms_profile.report import names
from ms_profile.report.intervals import Cover, Interval, length, union
from ms_profile.report.stream import integer, number
from ms_profile.report.summary import CommBytes, CommTime, MemoryPeak, ModuleTime

VERSION = 1
MATRIX_RANKS = 2048
PHASES = ("forward", "backward", "recompute", "other")
Record = Mapping[str, Any]


def record(data: object, kind: str) -> Record:
    """The checked record of a meter.

    Args:
        data: A meter, or what its `as_dict()` returned.
        kind: "flops", "comm", "memory" or "events".

    Raises:
        TypeError: It is neither.
        ValueError: It is of another kind or version, or a value in it is impossible.
    """
    if callable(getattr(data, "as_dict", None)):
        data = cast(Any, data).as_dict()
    if not isinstance(data, Mapping):
        raise TypeError(f"a meter or its as_dict() is needed, got {type(data).__name__}")
    found, version = data.get("kind"), data.get("version")
    if found != kind:
        raise ValueError(f"a record of kind {kind!r} is needed, got kind {found!r}")
    if version != VERSION:
        raise ValueError(f"version {version!r} of a {kind} record is not known, only {VERSION}")
    _CHECKS[kind](data)
    return data


def save(meter: object, folder: str | os.PathLike[str], rank: int | None = None) -> Path:
    """Writes the record of a meter where `read_run` and `mindspeed profile` find it.

    Args:
        meter: A meter, or what its `as_dict()` returned.
        folder: Made, with mode 0750, if it is not there.
        rank: For the file's name; by default what the record says, else 0.

    Returns:
        The new file `rank<R>.<kind>.json`, or with a number if that is taken.

    Raises:
        TypeError, ValueError: As `record`; also if the folder cannot be made.
    """
    data = cast(Any, meter).as_dict() if callable(getattr(meter, "as_dict", None)) else meter
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if kind is not None and kind not in _CHECKS:
        raise ValueError(f"no kind of record is named {kind!r}; there are {', '.join(_CHECKS)}")
    found = record(data, str(kind))
    place = found.get("rank", 0) if rank is None else rank
    if found.get("rank", place) != place:
        raise ValueError(f"the record is of rank {found['rank']}, not of rank {rank}")
    name = f"rank{integer(place, 'rank', high=9_999_999)}.{kind}.json"
    return write_new(make_folder(folder), name, json.dumps(found))


def records(data: object, kind: str) -> list[Record]:
    """The checked records of one meter or of several: one, a sequence, or a mapping's values."""
    if isinstance(data, Mapping) and "kind" not in data:
        data = list(data.values())
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        if not data:
            raise ValueError(f"no {kind} record is given")
        return [record(each, kind) for each in data]
    return [record(data, kind)]


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is a {type(value).__name__}, not an object")
    return value


def _list(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} is a {type(value).__name__}, not a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is a {type(value).__name__}, not text")
    return value


def _check_flops(data: Record) -> None:
    for part in ("by_module", "by_op"):
        for name, phases in _mapping(data.get(part, {}), part).items():
            _check_phases(phases, f"{part}[{name!r}]")
    _check_phases(data.get("total"), "total")


def _check_phases(phases: object, what: str) -> None:
    for phase, count in _mapping(phases, what).items():
        integer(count, f"{what}[{phase!r}]")


def _check_comm(data: Record) -> None:
    world = integer(data.get("world_size"), "world_size", low=1, high=1 << 24)
    integer(data.get("rank"), "rank", high=world - 1)
    for index, call in enumerate(_list(data.get("calls"), "calls")):
        what = f"calls[{index}]"
        call = _mapping(call, what)
        for name in ("op", "group"):
            _text(call.get(name), f"{what}.{name}")
        for name in ("bytes", "wire_bytes"):
            integer(call.get(name), f"{what}.{name}")
        for peer, count in _mapping(call.get("to", {}), f"{what}.to").items():
            _peer(peer, world, what)
            integer(count, f"{what}.to[{peer!r}]")


def _peer(peer: object, world: int, what: str) -> int:
    # JSON has no integer keys.
    text = str(peer)
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) < world):
        raise ValueError(f"{what}.to names {peer!r}, no rank of a world of {world}")
    return int(text)


def _check_memory(data: Record) -> None:
    peak = _mapping(data.get("peak"), "peak")
    integer(peak.get("bytes"), "peak.bytes")
    for index, point in enumerate(_list(data.get("timeline", []), "timeline")):
        what = f"timeline[{index}]"
        if len(_list(point, what)) != 3:
            raise ValueError(f"{what} has {len(point)} entries, not index, seconds and bytes")
        number(point[0], f"{what} index", low=-1)
        number(point[1], f"{what} seconds", low=-1e9, high=1e12)
        number(point[2], f"{what} bytes", low=-(1 << 62))
    for index, mark in enumerate(_list(data.get("marks", []), "marks")):
        what = f"marks[{index}]"
        _text(_mapping(mark, what).get("name"), f"{what}.name")
        number(mark.get("seconds"), f"{what}.seconds", low=-1e9, high=1e12)
        number(mark.get("index", 0), f"{what}.index", low=-1)


def _check_events(data: Record) -> None:
    integer(data.get("rank"), "rank", high=1 << 24)
    number(data.get("start", 0), "start", high=1e12)
    for index, event in enumerate(_list(data.get("events"), "events")):
        what = f"events[{index}]"
        event = _mapping(event, what)
        for name in ("name", "kind"):
            _text(event.get(name), f"{what}.{name}")
        begin = number(event.get("begin"), f"{what}.begin", low=-1e12, high=1e12)
        number(event.get("end"), f"{what}.end", low=begin, high=1e12)


_CHECKS: Mapping[str, Callable[[Record], None]] = {
    "flops": _check_flops,
    "comm": _check_comm,
    "memory": _check_memory,
    "events": _check_events,
}


def comm_bytes(data: Record) -> tuple[CommBytes, ...]:
    """Calls and bytes per group and operation, in the order of first use."""
    sums: dict[tuple[str, str], list[int]] = {}
    for call in data["calls"]:
        row = sums.setdefault((call["group"], call["op"]), [0, 0, 0])
        for i, value in enumerate((1, call["bytes"], call["wire_bytes"])):
            row[i] += value
    return tuple(CommBytes(group, op, *row) for (group, op), row in sums.items())


def matrix(data: Sequence[Record]) -> list[list[int]]:
    """Bytes that each rank (row) sends to each rank (column), summed over the records' calls."""
    world = data[0]["world_size"]
    if world > MATRIX_RANKS:
        raise ValueError(f"a matrix has at most {MATRIX_RANKS} ranks, got a world of {world}")
    cells = [[0] * world for _ in range(world)]
    seen: set[int] = set()
    for each in data:
        if each["world_size"] != world:
            raise ValueError(f"records of worlds of {world} and of {each['world_size']} ranks")
        if each["rank"] in seen:
            raise ValueError(f"two records are of rank {each['rank']}")
        seen.add(each["rank"])
        for call in each["calls"]:
            for peer, count in call.get("to", {}).items():
                cells[each["rank"]][int(peer)] += count
    return cells


def memory_peak(data: Record) -> MemoryPeak:
    """The peak of a memory record."""
    peak = data["peak"]
    place = {name: str(peak.get(name) or "") for name in ("module", "phase", "op")}
    return MemoryPeak(peak["bytes"], **place)


def aligned(data: Sequence[Record]) -> list[Record]:
    """Event records of several ranks on one clock, which begins with the first rank's.

    `start` is the time of day at a record's second 0; without it the clocks are taken as one.
    """
    if not all("start" in each for each in data):
        return list(data)
    first = min(each["start"] for each in data)
    return [_shifted(each, each["start"] - first) for each in data]


def _shifted(data: Record, seconds: float) -> Record:
    moved = [
        {**event, "begin": event["begin"] + seconds, "end": event["end"] + seconds}
        for event in data["events"]
    ]
    return {**data, "events": moved}


@dataclass(frozen=True)
class EventTimes:
    """Sums over the events of one rank."""

    modules: tuple[ModuleTime, ...]
    comm: tuple[CommTime, ...]


def event_times(data: Record) -> EventTimes:
    """Time of computation by module, and of communication by group and operation."""
    compute: list[Interval] = []
    modules: dict[str, list[int]] = {}
    transfers: dict[tuple[str, str], list[Interval]] = {}
    for event in data["events"]:
        interval = round(event["begin"] * 1e9), round(event["end"] * 1e9)
        if event["kind"] == "compute":
            compute.append(interval)
            row = modules.setdefault(str(event.get("module") or ""), [0, 0])
            row[0] += 1
            row[1] += interval[1] - interval[0]
        elif event["kind"] == "comm":
            key = str(event.get("group") or ""), names.collective(event["name"])
            transfers.setdefault(key, []).append(interval)
    cover = Cover(union(compute))
    rows = [ModuleTime(name, n, ns / 1e9, ns / 1e9) for name, (n, ns) in modules.items() if name]
    return EventTimes(
        tuple(sorted(rows, key=lambda row: (-row.self_s, row.module))),
        tuple(
            CommTime(
                *key,
                calls=len(intervals),
                time_s=length(union(intervals)) / 1e9,
                exposed_s=cover.outside(union(intervals)) / 1e9,
            )
            for key, intervals in sorted(transfers.items())
        ),
    )


def sizes(values: object) -> dict[str, int]:
    """Bytes of one module by name; a bare number has the empty name."""
    if isinstance(values, Mapping):
        return {str(name): value for name, value in values.items() if isinstance(value, int)}
    return {"": values} if isinstance(values, int) else {}
