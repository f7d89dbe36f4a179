"""What the `mindspeed` command prints: tables for people, one Markdown page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed import levels
from mindspeed.features import load_features
from mindspeed.features.flags import FlagRow, flag_rows
from mindspeed.patching.slot import load

if TYPE_CHECKING:
    from mindspeed.doctor import Finding
    from mindspeed.patching.matrix import Pair
    from mindspeed.patching.plan import Plan
    from mindspeed.patching.table import Table

_STYLE = {"apply": "green", "probe": "green", "refused": "red", "ok": "green", "bad": "red"}
_STYLE |= {"note": "yellow", "kept": "green", "native": "cyan", "dropped": "red"}


def _show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLE.get(cell, "")) for cell in row))
    # Files and pipes get wide lines, so that names stay whole.
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def show_plan(made: Plan) -> None:
    """Print a plan as a table, then its problems."""
    found = "assumed, none is installed" if made.assumed else "installed"
    title = f"plan {made.digest}: level {made.level} ({levels.MEANING[made.level]}), device"
    title += f" {made.device}, megatron-core {made.megatron} ({found})"
    columns = ("target", "kind", "feature", "because", "status", "reason or note")
    _show(
        title,
        columns,
        [
            (
                step.patch.target,
                step.patch.kind,
                step.feature,
                step.because,
                step.status,
                step.patch.reason if step.status in ("apply", "probe") else step.note,
            )
            for step in made.steps
        ],
    )
    print(made.summary())
    for number, text in enumerate(made.problems, 1):
        print(f"problem {number}: {text}")


def show_advice(made: Plan, config: object) -> None:
    """Print what the active features say about when they pay in this configuration."""
    for feature in load_features():
        if feature.advise is not None and feature.name in made.features:
            print(f"{feature.name}: {load(feature.advise)(config)}")


def feature_rows() -> list[dict[str, Any]]:
    """Built features, then the planned ones of the flag table."""
    rows: list[dict[str, Any]] = [
        {
            "feature": feature.name,
            "level": feature.level,
            "status": "built",
            "packages": list(feature.packages),
            "flags": [flag.name for flag in feature.flags],
            "patches": len(feature.patches),
            "doc": feature.doc,
        }
        for feature in load_features()
    ]
    planned: dict[str, list[FlagRow]] = {}
    for row in flag_rows():
        if row.flag.status == "planned":
            planned.setdefault(row.feature, []).append(row)
    for name, members in planned.items():
        rows.append(
            {
                "feature": name,
                "level": members[0].level,
                "status": "planned",
                "packages": sorted({member.package for member in members}),
                "flags": [member.flag.name for member in members],
                "patches": 0,
                "doc": members[0].flag.help,
            }
        )
    return rows


def show_features(rows: Sequence[dict[str, Any]]) -> None:
    """Print the features."""
    columns = ("feature", "level", "status", "packages", "flags", "patches", "what it does")
    _show(
        "features",
        columns,
        [
            (
                row["feature"],
                str(row["level"]),
                row["status"],
                " ".join(row["packages"]),
                " ".join(row["flags"]),
                str(row["patches"]),
                row["doc"],
            )
            for row in rows
        ],
    )


def show_conflicts(table: Table, matrix: Sequence[Pair]) -> None:
    """Print the pair matrix, then the reason of each pair."""
    names = [feature.name for feature in table.features]
    excluded = {frozenset((pair.first, pair.second)) for pair in matrix}
    rows = []
    for index, name in enumerate(names):
        cells = [("x" if frozenset((name, other)) in excluded else ".") for other in names[:index]]
        rows.append((str(index + 1), name, *cells, *[""] * (len(names) - index)))
    columns = ("", "feature", *(str(number) for number in range(1, len(names) + 1)))
    _show("pairs of built features: x cannot be combined", columns, rows)
    for pair in matrix:
        for text in pair.because:
            print(f"{pair.first} x {pair.second}: {text}")
    if not matrix:
        print("every pair can be combined")


def _fate(row: FlagRow) -> str:
    if row.flag.status == "native":
        same = row.flag.maps_to == row.flag.name
        return "Megatron's own" if same else f"Megatron's {row.flag.maps_to}; taken as that"
    if row.flag.status == "planned":
        return f"planned in {row.package}; an error until then"
    return row.flag.reason or f"acts ({row.feature})"


def show_flags(rows: Sequence[FlagRow]) -> None:
    """Print the flag table."""
    columns = ("flag", "type", "default", "feature", "level", "status", "meaning", "what becomes")
    _show(
        f"{len(rows)} flags of MindSpeed",
        columns,
        [
            (
                " ".join((row.flag.name, *row.flag.aliases)),
                row.flag.type,
                str(row.flag.default),
                row.feature,
                str(row.level),
                row.flag.status,
                row.flag.help,
                _fate(row),
            )
            for row in rows
        ],
    )


def show_findings(findings: Sequence[Finding]) -> None:
    """Print the doctor's findings."""
    rows = [(f.verdict, f.subject, f.found, f.advice) for f in findings]
    _show("mindspeed doctor", ("", "subject", "found", "what to do, or what it costs"), rows)


def flags_markdown() -> str:
    """The page `docs/flags.md`."""
    rows = flag_rows()
    counts = Counter(row.flag.status for row in rows)
    lines = [
        "# The flags of MindSpeed",
        "",
        "<!-- Generated: mindspeed flags --markdown > docs/flags.md -->",
        "",
        f"MindSpeed adds {len(rows)} flags to Megatron-LM. Each has one of four fates here:",
        "",
        f"- **kept** ({counts['kept']}): acts as it says.",
        f"- **native** ({counts['native']}): Megatron has it itself, under this or another name;"
        " another name is taken as that, with a warning.",
        f"- **planned** ({counts['planned']}): not built yet; giving it is an error that says so.",
        f"- **dropped** ({counts['dropped']}): not supported; giving it is an error that says what"
        " to use instead.",
        "",
        "No flag is ignored without a word.",
        "",
        "| flag | type | default | meaning | feature | level | status | what becomes of it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_markdown_row, rows)]) + "\n"


def _markdown_row(row: FlagRow) -> str:
    flag = row.flag
    names = ", ".join(f"`{name}`" for name in (flag.name, *flag.aliases))
    kind: str = flag.type
    if flag.choices:
        kind += ": " + ", ".join(map(str, flag.choices))
    default = "off" if flag.default is False else "on" if flag.default is True else flag.default
    cells = (names, kind, "" if default is None else str(default), flag.help, row.feature)
    return "| " + " | ".join((*cells, str(row.level), flag.status, _fate(row))) + " |"
