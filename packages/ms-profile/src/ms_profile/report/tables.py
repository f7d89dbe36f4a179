"""Tables on the terminal. Needs rich.

Names come from files that others wrote: they are shown as plain text, without markup, and with
control characters escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ms_profile.report import meters, units
from ms_profile.report.stream import printable

if TYPE_CHECKING:
    from rich.console import Console

TOP = 10


def make_console() -> Console:
    """Standard output."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            "tables need rich: pip install 'ms-profile[report]'", name=error.name
        ) from error
    # Files and pipes get wide lines, so that names stay whole.
    return Console(width=None if sys.stdout.isatty() else 160)


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    console: Console | None = None,
    *,
    texts: int = 1,
) -> None:
    """Prints a table.

    Args:
        title: Above it.
        columns: Headings.
        rows: Cells; shown as they are, whatever they contain.
        console: Where to, else standard output.
        texts: How many of the first columns are text; the others are numbers, set to the right.
    """
    console = console or make_console()
    from rich.table import Table
    from rich.text import Text

    # As a title of the table it would be wrapped at the table's width.
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(
            Text(column), justify="left" if index < texts else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _phases(counts: dict[str, int]) -> list[str]:
    return [phase for phase in meters.PHASES if counts.get(phase)]


def print_flops(data: object, *, top: int = TOP, console: Console | None = None) -> None:
    """Prints FLOPs by module and phase, most first.

    Args:
        data: A FlopMeter or its `as_dict()`.
        top: How many modules.
        console: Where to, else standard output.
    """
    found = meters.record(data, "flops")
    total = found["total"]
    phases = _phases(total)
    whole = sum(total.values())

    def cells(name: str, counts: dict[str, int]) -> tuple[str, ...]:
        here = sum(counts.values())
        parts = (units.flops(counts.get(phase, 0)) for phase in phases)
        return (name, *parts, units.flops(here), units.share(here, whole))

    modules = sorted(found.get("by_module", {}).items(), key=lambda i: (-sum(i[1].values()), i[0]))
    rows = [cells(name or "(no module)", counts) for name, counts in modules[:top]]
    rows.append(cells("all", total))
    show("FLOPs by module", ("module", *phases, "sum", "share"), rows, console)


def print_communication(data: object, *, console: Console | None = None) -> None:
    """Prints calls and bytes by group and operation.

    Args:
        data: A CommMeter or its `as_dict()`, or those of several ranks, which are added up.
        console: Where to, else standard output.
    """
    found = meters.records(data, "comm")
    sums: dict[tuple[str, str], list[int]] = {}
    for row in (row for each in found for row in meters.comm_bytes(each)):
        line = sums.setdefault((row.group, row.op), [0, 0, 0])
        for i, value in enumerate((row.calls, row.bytes, row.wire_bytes)):
            line[i] += value
    rows = [
        (group, op, str(calls), units.size(payload), units.size(wire))
        for (group, op), (calls, payload, wire) in sums.items()
    ]
    title = f"communication of {len(found)} rank{'s' * (len(found) > 1)}"
    show(title, ("group", "operation", "calls", "payload", "on the wire"), rows, console, texts=2)


def print_memory(data: object, *, top: int = TOP, console: Console | None = None) -> None:
    """Prints the peak and the memory by module.

    Args:
        data: A MemoryMeter or its `as_dict()`.
        top: How many modules.
        console: Where to, else standard output.
    """
    found = meters.record(data, "memory")
    peak = meters.memory_peak(found)
    place = ", ".join(part for part in (peak.module, peak.phase, peak.op) if part)
    title = f"memory: peak {units.size(peak.bytes)}" + (f" in {place}" if place else "")
    modules = found.get("by_module", {})
    names = sorted({name for values in modules.values() for name in meters.sizes(values)})
    order = sorted(modules, key=lambda m: (-max(meters.sizes(modules[m]).values(), default=0), m))
    rows = [
        (module or "(no module)", *(units.size(sizes[n]) if n in sizes else "" for n in names))
        for module in order[:top]
        for sizes in (meters.sizes(modules[module]),)
    ]
    show(title, ("module", *(name or "bytes" for name in names)), rows, console)


def say(console: Console, text: str) -> None:
    """Prints a line of plain text."""
    console.print(printable(text, 1000), markup=False, highlight=False, soft_wrap=True)
