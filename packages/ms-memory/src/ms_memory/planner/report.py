"""A plan for people: a table, JSON, and a picture of the bytes over a step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .plan import MS, Decision, Plan, Point

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_COLUMNS = ("site", "action", "freed", "ms", "why")
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


def size(nbytes: int) -> str:
    """Return bytes as people read them; whole numbers below one KiB."""
    for unit, name in _UNITS:
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"


def text(plan: Plan) -> str:
    """Return the report as text; neighbours that are treated alike share a line."""
    optimal = "proven fastest" if plan.proven else f"within {plan.gap:.1%} of the fastest"
    lines = [
        f"memory plan {plan.digest[:12]}: {optimal}",
        f"  peak      {size(plan.peak)} at {plan.peak_event}; unplanned {size(max(plan.unplanned))}"
        f" at {plan.events[plan.unplanned.index(max(plan.unplanned))]}",
        f"  budget    {size(plan.budget)}; the smallest with a plan is {size(plan.minimum)}",
        f"  added     {plan.time / MS:.3f} ms; no plan adds less than {plan.bound / MS:.3f} ms",
        f"  host      {size(plan.host)}",
        "",
        *_table(plan.decisions),
    ]
    if plan.shadow:
        lines += ["", *(_shadow(plan, point) for point in plan.shadow)]
    if plan.curve:
        lines += ["", "least time added by budget:", *map(_point, plan.curve)]
    return "\n".join(lines)


def to_json(plan: Plan) -> str:
    """Return the plan as JSON; `Plan.from_dict(json.loads(...))` reads it."""
    return json.dumps(plan.as_dict(), indent=1)


def picture(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draw the live bytes at every event, unplanned and planned, and the budget.

    Args:
        plan: what to draw.
        path: file that ends in .png or .svg.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found = Path(path)
    if found.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"picture: path: got {found}, need a name that ends in .png or .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("picture: need matplotlib: pip install 'ms-memory[report]'") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, name = _unit(max(plan.unplanned))
    for label, live, color in (("unplanned", plan.unplanned, GREY), ("planned", plan.live, BLUE)):
        axes.step(range(len(live)), [b / unit for b in live], where="mid", color=color, label=label)
    axes.axhline(plan.budget / unit, color=ORANGE, linestyle="--", label="budget")
    every = max(1, len(plan.events) // 12)
    axes.set_xticks(
        range(0, len(plan.events), every), plan.events[::every], rotation=45, ha="right"
    )
    axes.set_ylabel(f"bytes alive ({name})")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center")
    figure.savefig(found)
    return found


def compare(first: Plan, second: Plan) -> str:
    """Say what differs between two plans, such as those of one model for two devices."""
    others = {d.site: d for d in second.decisions}
    lines = [
        f"time added {first.time / MS:.3f} -> {second.time / MS:.3f} ms,"
        f" peak {size(first.peak)} -> {size(second.peak)},"
        f" host {size(first.host)} -> {size(second.host)}"
    ]
    for mine in first.decisions:
        other = others.get(mine.site)
        if other is None:
            lines.append(f"  {mine.site}: only in the first")
        elif mine.option.name != other.option.name:
            lines.append(f"  {mine.site}: {mine.option.name} -> {other.option.name}")
    mine_sites = {d.site for d in first.decisions}
    lines += [f"  {name}: only in the second" for name in others if name not in mine_sites]
    return "\n".join(lines)


def _unit(nbytes: int) -> tuple[int, str]:
    return next(((unit, name) for unit, name in _UNITS if nbytes >= unit), (1, "B"))


def _table(decisions: Sequence[Decision]) -> list[str]:
    rows = [_COLUMNS, *(_row(group) for group in _groups(decisions))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    numbers = (2, 3)
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _groups(decisions: Sequence[Decision]) -> list[list[Decision]]:
    groups: list[list[Decision]] = []
    for decision in decisions:
        last = groups[-1][-1] if groups else None
        same = last is not None and (last.option.name, last.option.time, last.freed) == (
            decision.option.name,
            decision.option.time,
            decision.freed,
        )
        if same:
            groups[-1].append(decision)
        else:
            groups.append([decision])
    return groups


def _row(group: Sequence[Decision]) -> tuple[str, ...]:
    one = group[0]
    site = one.site if len(group) == 1 else f"{one.site} .. {group[-1].site} ({len(group)})"
    freed = sum(d.freed for d in group)
    time = sum(d.option.time for d in group)
    return site, one.option.name, size(freed), f"{time / MS:.3f}", _why(one)


def _why(decision: Decision) -> str:
    if not decision.cheaper:
        return "nothing is faster here"
    if not decision.option.time:
        return "free"
    rate = decision.freed / (1 << 20) / (decision.option.time / MS)
    return f"{rate:.1f} MiB a ms" if decision.freed > 0 else "frees its bytes at another event"


def _shadow(plan: Plan, point: Point) -> str:
    change = point.budget - plan.budget
    step = f"{'+' if change > 0 else '-'}{size(abs(change))}"
    if point.time is None:
        return f"{step}: " + ("no plan" if point.proven else "not found in time")
    verb = "saves" if change > 0 else "costs"
    return f"{step}: {verb} {abs(plan.time - point.time) / MS:.3f} ms"


def _point(point: Point) -> str:
    time = "no plan" if point.time is None else f"{point.time / MS:.3f} ms"
    return f"  {size(point.budget):>12}  {time}" + ("" if point.proven else " (not proven)")
