"""Event records as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_profile.report.meters import Record

_ORDER = ("mark", "compute", "launch", "comm", "wait")


@dataclass(frozen=True)
class Row:
    """The events of one kind on one rank; communications of each group apart, for they overlap."""

    rank: int
    kind: str
    group: str
    events: tuple[Record, ...]

    @property
    def label(self) -> str:
        """Kind, and group if there is one."""
        return f"{self.kind} {self.group}".strip()


def rows(data: Sequence[Record]) -> list[Row]:
    """Rows of a timeline by rank, kinds in one order."""
    found: dict[tuple[int, int, str, str], list[Record]] = {}
    for each in data:
        for event in each["events"]:
            kind = event["kind"]
            place = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
            group = str(event.get("group") or "") if kind == "comm" else ""
            found.setdefault((each["rank"], place, kind, group), []).append(event)
    return [
        Row(rank, kind, group, tuple(events))
        for (rank, _, kind, group), events in sorted(found.items())
    ]


def trace_events(data: Sequence[Record]) -> list[dict[str, Any]]:
    """The events of a Chrome trace: one process a rank, one thread a row; microseconds."""
    table = rows(data)
    first = min((event["begin"] for row in table for event in row.events), default=0.0)
    out: list[dict[str, Any]] = []
    for number, row in enumerate(table):
        place = {"pid": row.rank, "tid": number}
        process = {"name": f"rank {row.rank}"}
        out.append({"ph": "M", "name": "process_name", **place, "args": process})
        out.append({"ph": "M", "name": "thread_name", **place, "args": {"name": row.label}})
        out.extend(_event(event, row.kind, first, place) for event in row.events)
    return out


def _event(event: Record, kind: str, first: float, place: dict[str, int]) -> dict[str, Any]:
    args = {k: event[k] for k in ("group", "index", "phase", "module") if event.get(k) is not None}
    shared = {"name": event["name"], "cat": kind, "args": args, **place}
    shared["ts"] = round((event["begin"] - first) * 1e6, 3)
    if kind == "mark" and event["end"] == event["begin"]:
        return {"ph": "i", "s": "t", **shared}
    return {"ph": "X", "dur": round((event["end"] - event["begin"]) * 1e6, 3), **shared}


def write(data: Sequence[Record], path: Path) -> Path:
    """Writes the trace, packed if the name ends in .gz; returns the path."""
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": trace_events(data)})
    content = text.encode("ascii")
    # Without a time stamp inside, the same events give the same bytes.
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path
