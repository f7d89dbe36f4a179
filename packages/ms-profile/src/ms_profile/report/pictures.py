"""Pictures of what the meters counted; SVG or PNG by the file's suffix. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ms_profile.report import chrome, meters, units
from ms_profile.report.stream import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# Okabe and Ito's palette: distinct for every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY = "#999999"
_ROWS = {
    "compute": BLUE,
    "comm": ORANGE,
    "wait": VERMILION,
    "launch": GREEN,
    "mark": PURPLE,
}
_LABELS = {"comm": "communication"}
MAX_RANKS_WITH_NUMBERS = 16
MAX_MARKS = 12
MAX_ROWS = 256
MAX_SPANS = 4000  # of a row: more are not to be told apart


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'ms-profile[report]'", name=error.name
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _checked(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    found = Path(path)
    if found.suffix.lower() not in suffixes:
        raise ValueError(f"{found}: the file must end in {' or '.join(suffixes)}")
    return found


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    # Text stays text, and the same data give the same bytes.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ms-profile"}):
        figure.savefig(path, dpi=150, metadata=metadata)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class _Axis:
    """What runs to the right: a factor and a unit for one column of the timelines."""

    column: int
    factor: float
    unit: str

    def at(self, point: Sequence[float], begin: Sequence[float]) -> float:
        """Where a point of the timeline lies."""
        return (point[self.column] - begin[self.column]) * self.factor


def memory_curve(
    data: object, path: str | os.PathLike[str], *, by: Literal["time", "operator"] = "time"
) -> Path:
    """Draws live memory over time, the peak marked with its module and moment.

    Args:
        data: A MemoryMeter or its `as_dict()`; or a mapping from a label to one of these, to lay
            several runs over each other.
        path: Where to; .svg or .png.
        by: What runs to the right; by operators a program gives the same picture every time.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, or a record without a timeline.
        ImportError: matplotlib is not installed.
    """
    target = _checked(path)
    if by not in ("time", "operator"):
        raise ValueError(f"by must be 'time' or 'operator', got {by!r}")
    runs = _labelled(data)
    figure = _figure(7, 3.8)
    axes = figure.add_subplot()
    largest = max(max((p[2] for p in run["timeline"]), default=0) for run in runs.values())
    divisor, unit = units.binary_scale(largest)
    longest = max(run["timeline"][-1][1] - run["timeline"][0][1] for run in runs.values())
    axis = _Axis(1, *units.time_scale(longest)) if by == "time" else _Axis(0, 1.0, "")
    for color, (label, run) in zip((BLUE, ORANGE, GREEN, PURPLE), runs.items(), strict=False):
        _curve(axes, run, f"{label}: " if label else "", color, divisor, axis)
    axes.set_xlabel(f"time ({axis.unit})" if by == "time" else "operators run")
    axes.set_ylabel(f"live memory ({unit})")
    axes.set_ylim(0, 1.06 * max(largest, 1) / divisor)
    axes.set_xlim(left=0)
    if len(runs) == 1:
        _marks(axes, next(iter(runs.values())), axis)
    _plain(axes)
    legend = figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, target)
    return target


def _labelled(data: object) -> dict[str, meters.Record]:
    several = isinstance(data, Mapping) and "kind" not in data
    given = dict(data) if several and isinstance(data, Mapping) else {"": data}
    if not 1 <= len(given) <= 4:
        raise ValueError(f"one to four runs fit in one picture, got {len(given)}")
    runs = {str(label): meters.record(each, "memory") for label, each in given.items()}
    for label, run in runs.items():
        if not run.get("timeline"):
            raise ValueError(f"the memory record {label!r} has no timeline".replace(" ''", ""))
    return runs


def _curve(
    axes: Axes, run: meters.Record, label: str, color: str, divisor: float, axis: _Axis
) -> None:
    points = run["timeline"]
    places = [axis.at(point, points[0]) for point in points]
    live = [point[2] / divisor for point in points]
    axes.plot(places, live, drawstyle="steps-post", color=color, linewidth=1.3)
    axes.fill_between(places, live, step="post", color=color, alpha=0.12, linewidth=0)
    at = max(range(len(live)), key=live.__getitem__)
    peak = run["peak"]
    names = (str(peak.get(name) or "") for name in ("module", "phase", "op"))
    words = [units.size(peak["bytes"]), *(printable(each, 40) for each in names if each)]
    if axis.unit:
        words.append(f"at {places[at]:.3g} {axis.unit}")
    axes.plot(places[at], live[at], "o", color=color, label=f"{label}peak {', '.join(words)}")


def _marks(axes: Axes, run: meters.Record, axis: _Axis) -> None:
    """Moments that the user named, if they are few enough to be read."""
    marks = run.get("marks", [])
    if len(marks) > MAX_MARKS:
        return
    for mark in marks:
        moment = (mark.get("index", 0), mark["seconds"])
        at = axis.at(moment, run["timeline"][0])
        axes.axvline(at, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            printable(mark["name"], 24),
            (at, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(2, 0),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=7,
            color="#555555",
            parse_math=False,
        )


def communication_matrix(
    data: object, path: str | os.PathLike[str], *, group: str | None = None
) -> Path:
    """Draws the bytes that each rank sends to each other one.

    Args:
        data: CommMeters or their `as_dict()` of the ranks: a sequence, or a mapping's values.
        path: Where to; .svg or .png.
        group: Only the communication of this group.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, records of different worlds, two of one rank, over 2048 ranks.
        ImportError: matplotlib is not installed.
    """
    target = _checked(path)
    found = meters.records(data, "comm")
    if group is not None:
        found = [
            {**each, "calls": [c for c in each["calls"] if c["group"] == group]} for each in found
        ]
    cells = meters.matrix(found)
    side = min(9.0, 2.4 + 0.55 * len(cells))
    figure = _figure(side + 1.2, side)
    axes = figure.add_subplot()
    largest = max(map(max, cells))
    divisor, unit = units.binary_scale(largest)
    scaled = [[value / divisor for value in row] for row in cells]
    image = axes.imshow(scaled, cmap="Blues", vmin=0, vmax=max(largest, 1) / divisor)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(f"bytes sent ({unit})")
    bar.outline.set_visible(False)
    _matrix_axes(axes, len(cells))
    if len(cells) <= MAX_RANKS_WITH_NUMBERS:
        _matrix_numbers(axes, cells, largest)
    if group is not None:
        axes.set_title(f"group {printable(group, 40)}", fontsize=10, parse_math=False)
    _save(figure, target)
    return target


def _matrix_axes(axes: Axes, world: int) -> None:
    every = max(1, -(-world // 16))
    axes.set_xticks(range(0, world, every))
    axes.set_yticks(range(0, world, every))
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    axes.tick_params(length=0)
    axes.set_xticks([edge - 0.5 for edge in range(1, world)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, world)], minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="white", linewidth=1.0 if world <= 32 else 0.0)


def _matrix_numbers(axes: Axes, cells: list[list[int]], largest: int) -> None:
    font = 9 if len(cells) <= 8 else 6
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if value:
                color = "white" if value > 0.6 * largest else "black"
                text = units.size(value).replace(" ", "\n")
                axes.text(column, row, text, ha="center", va="center", fontsize=font, color=color)


def timeline(data: object, path: str | os.PathLike[str]) -> Path:
    """Draws what each rank did when: rows of computation, communication, waits and marks.

    Args:
        data: EventTraces or their `as_dict()` of the ranks: one, a sequence, a mapping's values.
        path: Where to: .svg or .png, or .json or .json.gz for a Chrome trace.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, no event at all, or more rows than a picture can show.
        ImportError: matplotlib is not installed (a Chrome trace does without).
    """
    found = meters.aligned(meters.records(data, "events"))
    if str(path).endswith((".json", ".json.gz")):
        return chrome.write(found, Path(path))
    target = _checked(path, (*SUFFIXES, ".json", ".json.gz"))
    events = [event for each in found for event in each["events"]]
    if not events:
        raise ValueError("the records hold no event")
    first = min(event["begin"] for event in events)
    factor, unit = units.time_scale(max(event["end"] for event in events) - first)
    rows = chrome.rows(found)
    if len(rows) > MAX_ROWS:
        raise ValueError(
            f"{len(rows)} rows do not fit in a picture of at most {MAX_ROWS}: draw fewer ranks, "
            "or write a Chrome trace (.json)"
        )
    figure = _figure(8, 1.1 + 0.3 * len(rows))
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        _row(axes, row, number, first, factor)
    _timeline_axes(axes, rows, unit)
    _save(figure, target)
    return target


def _row(axes: Axes, row: chrome.Row, number: int, first: float, factor: float) -> None:
    color = _ROWS.get(row.kind, GREY)
    spans = [
        ((event["begin"] - first) * factor, (event["end"] - event["begin"]) * factor)
        for event in row.events
    ]
    moments = [begin for begin, length in spans if not length]
    if moments:
        axes.plot(moments, [number] * len(moments), "|", color=color, ms=9, mew=1.2)
    # Marks may lie in one another. A thin border keeps events visible shorter than a pixel.
    alpha = 0.4 if row.kind == "mark" else 1.0
    lasting = _readable([span for span in spans if span[1]])
    axes.broken_barh(lasting, (number - 0.36, 0.72), color=color, linewidth=0.3, alpha=alpha)


def _readable(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans, or if there are very many, runs of them without the gaps that nobody can see."""
    if len(spans) <= MAX_SPANS:
        return spans
    spans = sorted(spans)
    last = max(begin + length for begin, length in spans)
    gap = (last - spans[0][0]) / MAX_SPANS
    merged = [list(spans[0])]
    for begin, length in spans[1:]:
        run = merged[-1]
        if begin <= run[0] + run[1] + gap:
            run[1] = max(run[1], begin + length - run[0])
        else:
            merged.append([begin, length])
    return [(begin, length) for begin, length in merged]


def _timeline_axes(axes: Axes, rows: Sequence[chrome.Row], unit: str) -> None:
    labels = [
        printable(f"rank {row.rank}  {_LABELS.get(row.kind, row.kind)} {row.group}".rstrip(), 48)
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for number in range(1, len(rows)):
        if rows[number].rank != rows[number - 1].rank:
            axes.axhline(number - 0.5, color=GREY, linewidth=0.6)
    axes.set_xlabel(f"time ({unit})")
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
