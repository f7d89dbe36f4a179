"""The summary beside a trace: torch's own averages by operator, written when the window ended.

It stands in for a trace that is missing, broken, or larger than the limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ms_profile.report.stream import Limits, TraceError, integer, load_record, number
from ms_profile.report.summary import Operator, RankSummary, add_operators

# Rows of Python functions, which are there if stacks were recorded: `file.py(7): name`.
_PYTHON = re.compile(r".*\(\d+\): |<built-in |nn\.Module: |<frozen ")


def read_averages(path: Path, rank: int, limits: Limits | None = None) -> RankSummary:
    """Reads a summary file.

    Args:
        path: `rank<R>_steps<A>-<B>.summary.json`.
        rank: Whose it is; the file must agree.
        limits: How much is read at most.

    Raises:
        TraceError: The file cannot be read, is no summary, or holds impossible numbers.
    """
    data = load_record(path, (limits or Limits()).record_bytes)
    try:
        return _checked(data, rank)
    except ValueError as error:
        raise TraceError(path, str(error)) from None


def _checked(data: Mapping[str, Any], rank: int) -> RankSummary:
    if data.get("kind") != "summary" or data.get("version") != 1:
        found = f"kind {data.get('kind')!r}, version {data.get('version')!r}"
        raise ValueError(f"a record of kind 'summary', version 1 is needed, got {found}")
    if integer(data.get("rank"), "rank") != rank:
        raise ValueError(f"is a summary of rank {data['rank']}")
    steps = [integer(step, "steps") for step in _list(data, "steps")]
    seconds = [number(each, "seconds", high=1e9) for each in _list(data, "seconds")]
    if len(steps) != len(seconds):
        raise ValueError(f"{len(steps)} steps have {len(seconds)} times")
    rows = [_row(row, index) for index, row in enumerate(_list(data, "operators"))]
    return RankSummary(
        rank,
        world_size=integer(data.get("world_size"), "world_size", low=1, high=1 << 24),
        iterations=tuple(steps),
        step_s=median(seconds) if seconds else None,
        operators=add_operators([tuple(row for row in rows if row is not None)]),
    )


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    found = data.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{name} is a {type(found).__name__}, not a list")
    return found


def _row(row: Any, index: int) -> Operator | None:
    """One row of the averages; None if it is no operator."""
    what = f"operators[{index}]"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise ValueError(f"{what} is not an object with a name")
    times = {
        name: number(row.get(name, 0), f"{what}.{name}", low=-1e3, high=1e15) / 1e6
        for name in ("self_us", "total_us", "device_self_us", "device_total_us")
    }
    calls = integer(row.get("calls"), f"{what}.calls")
    if row.get("mark") or _PYTHON.match(row["name"]):
        return None
    if times["total_us"] <= 0 < times["device_total_us"]:
        return Operator(
            row["name"], "device", calls, times["device_self_us"], times["device_total_us"]
        )
    return Operator(row["name"], "host", calls, times["self_us"], times["total_us"])
