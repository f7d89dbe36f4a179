"""Event records as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ms_profile.report.meters import Record

_ORDER = ("mark", "compute", "launch", "comm", "wait")


def rows(data: Sequence[Record]) -> list[tuple[int, str, list[Any]]]:
    """(rank, kind, events) for each row of a timeline, by rank, kinds in one order."""
    found: dict[tuple[int, int, str], list[Any]] = {}
    for each in data:
        for event in each["events"]:
            kind = event["kind"]
            place = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
            found.setdefault((each["rank"], place, kind), []).append(event)
    return [(rank, kind, events) for (rank, _, kind), events in sorted(found.items())]


def events(data: Sequence[Record]) -> list[dict[str, Any]]:
    """The events of a Chrome trace: one process a rank, one thread a kind; microseconds."""
    table = rows(data)
    first = min((e["begin"] for _, _, members in table for e in members), default=0.0)
    out: list[dict[str, Any]] = []
    for number, (rank, kind, members) in enumerate(table):
        place = {"pid": rank, "tid": number}
        out.append({"ph": "M", "name": "process_name", **place, "args": {"name": f"rank {rank}"}})
        out.append({"ph": "M", "name": "thread_name", **place, "args": {"name": kind}})
        out.extend(_event(event, kind, first, place) for event in members)
    return out


def _event(event: Record, kind: str, first: float, place: dict[str, int]) -> dict[str, Any]:
    args = {k: event[k] for k in ("group", "index", "phase", "module") if event.get(k) is not None}
    shared = {"name": event["name"], "cat": kind, "args": args, **place}
    shared["ts"] = round((event["begin"] - first) * 1e6, 3)
    if kind == "mark":
        return {"ph": "i", "s": "t", **shared}
    return {"ph": "X", "dur": round((event["end"] - event["begin"]) * 1e6, 3), **shared}


def write(data: Sequence[Record], path: Path) -> Path:
    """Writes the trace, packed if the name ends in .gz; returns the path."""
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events(data)})
    content = text.encode("ascii")
    # Without a time stamp inside, the same events give the same bytes.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path
