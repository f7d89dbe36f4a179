"""A run, or the changes between two, as tables on the terminal. Needs rich."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ms_profile.report import units
from ms_profile.report.changes import Change, Comparison
from ms_profile.report.summary import (
    CommBytes,
    CommTime,
    RankSummary,
    RunSummary,
    add_modules,
    add_operators,
    over_ranks,
)
from ms_profile.report.tables import TOP, make_console, say, show

if TYPE_CHECKING:
    from rich.console import Console

MOST_GROUPS = 100
_KINDS = {
    "compute_s": "compute",
    "exposed_communication_s": "communication, nothing computes",
    "exposed_copy_s": "memory copies, nothing else runs",
    "idle_s": "idle",
}


def print_summary(run: RunSummary, *, top: int = TOP, console: Console | None = None) -> None:
    """Prints what `summarise` found: times by kind, operators, modules, communication, memory."""
    console = console or make_console()
    _print_times(run, console)
    _print_ranks(run, console)
    _print_operators(run, top, console)
    _print_modules(run, top, console)
    _print_comm(run, console)
    _print_peaks(run, console)
    _print_flops(run, top, console)
    if not any(rank.modules for rank in run.ranks):
        say(console, "time by module: not recorded; profile(stack=True) or EventTrace records it")
    for note in run.notes:
        say(console, note)
    if run.missing:
        ranks = ", ".join(map(str, run.missing))
        say(console, f"incomplete: files of rank {ranks} could not be read")


def _print_times(run: RunSummary, console: Console) -> None:
    figures = over_ranks(run)
    if "total_s" not in figures:
        return
    total = figures["total_s"].median
    rows = []
    for name, label in {"step_s": "step, median", "total_s": "traced", **_KINDS}.items():
        if name in figures:
            found = figures[name]
            part = units.share(found.median, total) if name in _KINDS else ""
            where = f"rank {found.rank}" if len(run.ranks) > 1 else ""
            rows.append(
                (
                    label,
                    units.duration(found.median),
                    part,
                    units.duration(found.slowest),
                    where,
                    units.duration(found.spread),
                )
            )
    of = f"{len(run.ranks)} of {run.world_size}" if run.world_size else str(len(run.ranks))
    title = f"{run.path}: time by kind, median of {of} rank{'s' * (len(run.ranks) > 1)}"
    show(title, ("", "median", "share", "most", "of", "spread"), rows, console)


def _print_ranks(run: RunSummary, console: Console) -> None:
    """A line a rank, if there is more than one."""
    timed = [(rank, rank.kinds) for rank in run.ranks if rank.kinds is not None]
    if len(timed) < 2:
        return
    rows = [
        (
            str(rank.rank),
            _steps(rank),
            "" if rank.step_s is None else units.duration(rank.step_s),
            units.duration(kinds.compute_s),
            units.duration(kinds.communication_s),
            units.duration(kinds.exposed_communication_s),
            units.duration(kinds.copy_s),
            units.duration(kinds.idle_s),
        )
        for rank, kinds in timed
    ]
    columns = ("rank", "steps", "step", "compute", "communication", "exposed", "copies", "idle")
    show("per rank", columns, rows, console)


def _steps(rank: RankSummary) -> str:
    """Numbers of the steps: `10-11`, or how many if some are left out."""
    if not rank.iterations:
        return ""
    first, last = rank.iterations[0], rank.iterations[-1]
    if last - first + 1 != rank.steps:
        return f"{rank.steps} of {first}-{last}"
    return str(first) if first == last else f"{first}-{last}"


def _print_operators(run: RunSummary, top: int, console: Console) -> None:
    rows = add_operators([rank.operators for rank in run.ranks])
    for where, title in (("device", "kernels"), ("host", "operators")):
        here = [row for row in rows if row.where == where]
        whole = sum(row.self_s for row in here)
        shown = [
            (
                row.name,
                str(row.calls),
                units.duration(row.self_s),
                units.share(row.self_s, whole),
                units.duration(row.total_s),
            )
            for row in here[:top]
        ]
        if shown:
            title = f"{title} by self time on the {where}, {len(shown)} of {len(here)}, all ranks"
            show(title, ("name", "calls", "self", "share", "total"), shown, console)


def _print_modules(run: RunSummary, top: int, console: Console) -> None:
    found = add_modules([rank.modules for rank in run.ranks])
    rows = [
        (row.module, str(row.calls), units.duration(row.self_s), units.duration(row.total_s))
        for row in found[:top]
    ]
    if rows:
        title = f"modules by self time, {len(rows)} of {len(found)}, all ranks"
        show(title, ("module", "calls", "self", "total"), rows, console)


def _print_comm(run: RunSummary, console: Console) -> None:
    found: dict[tuple[str, str], tuple[list[CommBytes], list[CommTime]]] = {}
    for rank in run.ranks:
        for counted in rank.comm_bytes:
            found.setdefault((counted.group, counted.op), ([], []))[0].append(counted)
        for timed in rank.comm_times:
            found.setdefault((timed.group, timed.op), ([], []))[1].append(timed)
    rows = [_comm_row(*key, *found[key]) for key in list(found)[:MOST_GROUPS]]
    columns = ("group", "operation", "calls", "payload", "on the wire", "traced", "time", "exposed")
    if rows:
        left = len(found) - len(rows)
        title = "communication, all ranks" + (f"; {left} more rows are left out" if left else "")
        show(title, columns, rows, console, texts=2)


def _comm_row(
    group: str, op: str, counted: Sequence[CommBytes], timed: Sequence[CommTime]
) -> tuple[str, ...]:
    payload = [c.bytes for c in counted] or [c.bytes for c in timed if c.bytes is not None]
    return (
        group or "(not in the trace)",
        op,
        str(sum(c.calls for c in counted)) if counted else "",
        units.size(sum(payload)) if payload else "",
        units.size(sum(c.wire_bytes for c in counted)) if counted else "",
        str(sum(c.calls for c in timed)) if timed else "",
        units.duration(sum(c.time_s for c in timed)) if timed else "",
        _exposed(timed),
    )


def _exposed(timed: Sequence[CommTime]) -> str:
    known = [c.exposed_s for c in timed if c.exposed_s is not None]
    return units.duration(sum(known)) if known else ""


def _print_peaks(run: RunSummary, console: Console) -> None:
    rows = [
        (str(rank.rank), units.size(peak.bytes), peak.module, peak.phase, peak.op)
        for rank in run.ranks
        for peak in (rank.memory,)
        if peak is not None
    ]
    if rows:
        columns = ("rank", "bytes", "module", "phase", "operator")
        show("memory peak", columns, rows, console, texts=5)


def _print_flops(run: RunSummary, top: int, console: Console) -> None:
    sums: dict[str, int] = {}
    for module, phases in (item for rank in run.ranks for item in rank.flops.items()):
        sums[module] = sums.get(module, 0) + sum(phases.values())
    whole = sum(sums.values())
    order = sorted(sums, key=lambda name: (-sums[name], name))
    rows = [
        (name or "(no module)", units.flops(sums[name]), units.share(sums[name], whole))
        for name in order[:top]
    ]
    if rows:
        title = f"FLOPs by module, {len(rows)} of {len(order)}, all ranks: {units.flops(whole)}"
        show(title, ("module", "FLOPs", "share"), rows, console)


def print_comparison(found: Comparison, *, top: int = TOP, console: Console | None = None) -> None:
    """Prints what changed from one run to another."""
    console = console or make_console()
    say(console, f"A: {found.before}")
    say(console, f"B: {found.after}")
    labels = {"step_s": "step, median", "total_s": "traced", "communication_s": "communication"}
    labels |= {"copy_s": "memory copies", **_KINDS}
    times = [Change(labels[c.name], c.before, c.after) for c in found.times]
    _print_changes("time per step, mean of ranks", times, units.duration, len(times), console)
    parts: tuple[tuple[str, Sequence[Change], Callable[[float], str]], ...] = (
        ("operators: self time per step, mean of ranks", found.operators, units.duration),
        ("operators: calls per step, mean of ranks", found.calls, "{:g}".format),
        ("communication: bytes on the wire, all ranks", found.communication, units.size),
        ("memory peak", found.memory, units.size),
        ("FLOPs by module, all ranks", found.flops, units.flops),
    )
    for title, rows, unit in parts:
        _print_changes(
            title, [row for row in rows if row.difference or row.state], unit, top, console
        )
    for note in found.notes:
        say(console, note)
    if not any((found.times, *(rows for _, rows, _ in parts))):
        say(console, "the runs have no figure in common: nothing to compare")


def _print_changes(
    title: str,
    rows: Sequence[Change],
    unit: Callable[[float], str],
    top: int,
    console: Console,
) -> None:
    if not rows:
        return
    if len(rows) > top:
        title += f", {top} largest of {len(rows)} changes"
    shown = [
        (
            row.name,
            "" if row.before is None else unit(row.before),
            "" if row.after is None else unit(row.after),
            unit(row.difference),
            row.state or units.change(row.before or 0, row.after or 0),
        )
        for row in rows[:top]
    ]
    show(title, ("", "A", "B", "B - A", "change"), shown, console)
