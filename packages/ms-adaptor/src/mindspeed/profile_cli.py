"""The `mindspeed profile` command: sums up a profile, or compares two. Needs ms-profile."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ms_profile.report import Limits, Run

OK, PROBLEM = 0, 1
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def add_options(command: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    command.usage = "mindspeed profile RUN_DIR [RUN_DIR] [options]"
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="folder of a profile, of a run that holds one, or of the NPU's profiler; "
        "of two, the changes from the first to the second are shown",
    )
    command.add_argument("--top", type=_positive, default=10, help="rows of a table (10)")
    command.add_argument(
        "--picture", type=Path, metavar="DIR", help="also draw what the meters recorded, into DIR"
    )
    command.add_argument(
        "--max-size",
        type=_size,
        metavar="SIZE",
        help="refuse traces that are larger, packed or unpacked (1G)",
    )


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"([1-9]\d{0,11})([kmgt]?)(i?b)?", text.strip().lower(), re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write for instance 500M or 4G")
    return int(found[1]) * _UNITS[found[2]]


def run(options: argparse.Namespace) -> int:
    """Runs the command; 0: all read, 1: some files could not be read, 2: none could.

    Raises:
        ValueError: Nothing could be read, or the command line does not fit.
    """
    if len(options.runs) > 2:
        raise ValueError(f"one or two runs are looked at, got {len(options.runs)}")
    try:
        return _run(options)
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed; pip install 'mindspeed[profile]'"
    except ImportError as error:
        text = str(error)  # it names what to install
    print(f"mindspeed profile: {text}", file=sys.stderr)
    return PROBLEM


def _run(options: argparse.Namespace) -> int:
    from ms_profile import report

    limits = _limits(options.max_size)
    read = [report.read_run(path, limits) for path in options.runs]
    if len(read) == 1:
        _show_one(read[0], options)
    else:
        _show_two(read, options)
    problems = [problem for each in read for problem in each.summary.problems]
    for problem in problems:
        print(f"mindspeed profile: {problem}", file=sys.stderr)
    if options.picture is not None:
        _draw(read, options.picture)
    return PROBLEM if problems else OK


def _limits(size: int | None) -> Limits:
    from ms_profile.report import Limits

    usual = Limits()
    if size is None:
        return usual
    # The other limits grow with it.
    times = max(1, size // usual.trace_bytes)
    return Limits(size, usual.record_bytes * times, usual.trace_events * times)


def _show_one(read: Run, options: argparse.Namespace) -> None:
    from ms_profile import report

    if options.json:
        print(json.dumps(read.summary.as_dict(), indent=1))
    else:
        report.print_summary(read.summary, top=options.top)


def _show_two(read: list[Run], options: argparse.Namespace) -> None:
    from ms_profile import report

    found = report.compare(*(each.summary for each in read))
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        report.print_comparison(found, top=options.top)


def _draw(read: list[Run], folder: Path) -> None:
    """Draws every kind of record that there is; says so if there is none."""
    from ms_profile import report

    curves = _curves(read)
    if not curves and not any(each.meters.keys() & {"comm", "events"} for each in read):
        raise ValueError(
            "nothing to draw: the profile holds no record of a meter "
            "(rank<R>.comm.json, rank<R>.memory.json, rank<R>.events.json)"
        )
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    made: list[Path] = []
    for label, each in zip(("-a", "-b") if len(read) == 2 else ("",), read, strict=True):
        comm, events = (each.meters.get(kind) for kind in ("comm", "events"))
        if comm:
            made.append(report.communication_matrix(comm, folder / f"communication{label}.svg"))
        if events:
            made.append(report.timeline(events, folder / f"timeline{label}.svg"))
            made.append(report.timeline(events, folder / f"timeline{label}.json"))
    if curves:
        one = curves if len(curves) > 1 else next(iter(curves.values()))
        made.append(report.memory_curve(one, folder / "memory.svg"))
    for path in made:
        print(f"drawn: {path}", file=sys.stderr)


def _curves(read: list[Run]) -> dict[str, Any]:
    """Of each run the memory record of the rank with the highest peak."""
    found = {}
    for label, each in zip("AB", read, strict=False):
        memory = each.meters.get("memory", {})
        records = [record for record in memory.values() if record.get("timeline")]
        if records:
            found[label] = max(records, key=lambda record: int(record["peak"]["bytes"]))
    return found
