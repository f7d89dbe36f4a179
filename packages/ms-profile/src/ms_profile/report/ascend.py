"""Results of the NPU's profiler: the tables that it writes beside its raw data.

Read are `step_trace_time.csv` (where the time of a step went), `op_statistic.csv` (kernels by type)
and `communication.json` (collectives by group), with the column names of the CANN documentation.
Files that a low collection level leaves out are left out here.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ms_profile.report import names
from ms_profile.report.stream import Limits, TraceError, load_record, number, read_chunks
from ms_profile.report.summary import CommTime, Kinds, Operator, RankSummary

OUTPUT = "ASCEND_PROFILER_OUTPUT"
_STEP_COLUMNS = ("Computing", "Communication(Not Overlapped)", "Communication", "Free")


def read_results(folder: Path, rank: int, limits: Limits | None = None) -> RankSummary:
    """What one rank's result folder says.

    Args:
        folder: Its name ends in `_ascend_pt`.
        rank: Whose it is.
        limits: How much is read of a file at most.

    Raises:
        TraceError: The folder holds none of the files, or one of them is not what it should be.
    """
    limit = (limits or Limits()).record_bytes
    output = folder / OUTPUT
    if output.is_symlink():
        raise TraceError(output, "is a symbolic link, which is not followed")
    files = {
        name: output / name
        for name in ("step_trace_time.csv", "op_statistic.csv", "communication.json")
        if (output / name).exists() or (output / name).is_symlink()
    }
    if not files:
        raise TraceError(output, "holds no results: has the profile been analysed?")
    steps: tuple[int, ...] = ()
    kinds, step_s = None, None
    if "step_trace_time.csv" in files:
        steps, kinds = _steps(files["step_trace_time.csv"], limit)
        step_s = kinds.total_s / len(steps)
    operators = _operators(files["op_statistic.csv"], limit) if "op_statistic.csv" in files else ()
    comm = _comm(files["communication.json"], limit) if "communication.json" in files else ()
    return RankSummary(
        rank,
        iterations=steps,
        step_s=step_s,
        kinds=kinds,
        source="device",
        operators=operators,
        comm_times=comm,
    )


def _rows(path: Path, columns: tuple[str, ...], limit: int) -> Iterator[dict[str, str]]:
    try:
        text = b"".join(read_chunks(path, limit)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(path, f"is not UTF-8: {error}") from None
    reader = csv.DictReader(text.splitlines(), strict=True)
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(path, f"has no column {', '.join(missing)}")
        for row in reader:
            if None in row.values():
                raise TraceError(path, f"is cut: line {reader.line_num} has too few columns")
            yield row
    except csv.Error as error:
        raise TraceError(path, f"line {reader.line_num}: {error}") from None


def _number(path: Path, row: Mapping[str, str], column: str) -> float:
    try:
        return number(float(row[column]), column, high=1e15)
    except ValueError as error:
        raise TraceError(path, f"column {column}: {error}") from None


def _steps(path: Path, limit: int) -> tuple[tuple[int, ...], Kinds]:
    """Times are microseconds, one row a step; without steps one row with an empty step."""
    sums = dict.fromkeys(_STEP_COLUMNS, 0.0)
    steps: list[int] = []
    for row in _rows(path, _STEP_COLUMNS, limit):
        text = row.get("Step") or ""
        steps.append(int(text) if text.isdecimal() and len(text) < 19 else len(steps))
        for column in _STEP_COLUMNS:
            sums[column] += _number(path, row, column) / 1e6
    if not steps:
        raise TraceError(path, "has no row")
    compute, exposed, comm, idle = sums.values()
    total = compute + exposed + idle
    return tuple(steps), Kinds(total, compute, comm, exposed, 0.0, 0.0, idle)


def _operators(path: Path, limit: int) -> tuple[Operator, ...]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in _rows(path, ("OP Type", "Count", "Total Time(us)"), limit):
        found = sums[row["OP Type"]]
        found[0] += _number(path, row, "Count")
        found[1] += _number(path, row, "Total Time(us)") / 1e6
    rows = [Operator(name, "device", int(n), s, s) for name, (n, s) in sums.items()]
    return tuple(sorted(rows, key=lambda row: (-row.self_s, row.name)))


def _comm(path: Path, limit: int) -> tuple[CommTime, ...]:
    """Steps, then `collective` or `p2p`, then `operator@group`; times in milliseconds."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in load_record(path, limit).values():
        for part in _object(path, step).values():
            for name, entry in _object(path, part).items():
                operator, _, group = name.partition("@")
                if operator.startswith("Total"):
                    continue
                time = _object(path, _object(path, entry).get("Communication Time Info", {}))
                try:
                    elapsed = number(time.get("Elapse Time(ms)"), "Elapse Time(ms)", high=1e12)
                except ValueError as error:
                    raise TraceError(path, str(error)) from None
                row = sums[group, names.collective(operator)]
                row[0] += 1
                row[1] += elapsed / 1e3
    return tuple(
        CommTime(group, op, int(calls), seconds, None)
        for (group, op), (calls, seconds) in sorted(sums.items())
    )


def _object(path: Path, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TraceError(path, f"holds a {type(value).__name__} where an object is needed")
    return value
