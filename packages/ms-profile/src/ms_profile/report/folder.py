"""Which files of a folder belong to a profile. Names only: nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ms_profile.report.stream import TraceError, printable

METERS = ("flops", "comm", "memory", "events")
NPU_SUFFIX = "_ascend_pt"
_DEPTH = 4  # of folders below a run's folder that are looked into
_MANY = 20_000  # entries looked at before giving up
_WINDOW = re.compile(
    r"rank(?P<rank>\d{1,7})_(?P<window>steps\d+-\d+|[\w-]+)(?:\.(?P<copy>\d{1,6}))?"
    r"\.(?P<kind>pt\.trace|summary)\.json(?P<gz>\.gz)?",
    re.ASCII,
)
_METER = re.compile(
    rf"rank(?P<rank>\d{{1,7}})\.(?P<kind>{'|'.join(METERS)})(?:\.(?P<copy>\d{{1,6}}))?\.json",
    re.ASCII,
)


@dataclass
class RankFiles:
    """Files of one rank.

    Attributes:
        traces: By window, for instance `steps10-12`; the newest of each.
        summaries: Likewise.
        meters: By kind; the newest of each.
        npu: Result folders of the NPU's profiler.
    """

    traces: dict[str, Path] = field(default_factory=dict)
    summaries: dict[str, Path] = field(default_factory=dict)
    meters: dict[str, Path] = field(default_factory=dict)
    npu: list[Path] = field(default_factory=list)


@dataclass
class Folder:
    """A profile folder.

    Attributes:
        path: Where it is.
        ranks: Files by rank.
        notes: Files that were passed over, and why.
    """

    path: Path
    ranks: dict[int, RankFiles] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(path: str | os.PathLike[str]) -> Folder:
    """The profile in a folder, or in the only folder below it that holds one.

    Args:
        path: A profile folder, the folder of a run of `mindspeed train`, or a result folder of the
            NPU's profiler.

    Raises:
        TraceError: There is no such folder, no profile in it, or more than one.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise TraceError(path, "is not a folder" if root.exists() else "no such folder")
    if root.name.endswith(NPU_SUFFIX):
        return _scan(root.parent, only=root)
    found = [folder for folder in _below(root) if _holds_profile(folder)]
    if root in found:
        found = [root]
    if not found:
        raise TraceError(
            path,
            f"holds no profile: no rank*.pt.trace.json, no rank*.json of a meter, no *{NPU_SUFFIX}",
        )
    if len(found) > 1:
        names = ", ".join(sorted(str(folder.relative_to(root)) for folder in found)[:8])
        raise TraceError(path, f"holds {len(found)} profiles, name one, or two to compare: {names}")
    return _scan(found[0])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise TraceError(folder, f"cannot be read: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _below(root: Path) -> Iterator[Path]:
    """The folder and those below it; links are not followed."""
    left, level = _MANY, [root]
    for _ in range(_DEPTH):
        deeper: list[Path] = []
        for folder in level:
            yield folder
            entries = _entries(folder)
            left -= len(entries)
            if left < 0:
                raise TraceError(
                    root, f"holds more than {_MANY} entries: name the profile's folder"
                )
            deeper += [
                folder / entry.name
                for entry in entries
                if _is_folder(entry) and not entry.name.endswith(NPU_SUFFIX)
            ]
        level = deeper


def _holds_profile(folder: Path) -> bool:
    return any(
        (_is_folder(entry) and entry.name.endswith(NPU_SUFFIX))
        or _WINDOW.fullmatch(entry.name)
        or _METER.fullmatch(entry.name)
        for entry in _entries(folder)
    )


def _scan(folder: Path, only: Path | None = None) -> Folder:
    found = Folder(folder if only is None else only)
    if only is not None:
        _add_npu(found, only)
        return found
    chosen: dict[tuple[int, str, str], tuple[int, Path]] = {}
    for entry in _entries(folder):
        path = folder / entry.name
        if _is_folder(entry) and entry.name.endswith(NPU_SUFFIX):
            _add_npu(found, path)
        elif match := _WINDOW.fullmatch(entry.name) or _METER.fullmatch(entry.name):
            parts = match.groupdict()
            key = int(parts["rank"]), parts["kind"], parts.get("window") or ""
            _choose(found, chosen, key, (int(parts["copy"] or 0), path))
    for (rank, kind, window), (_, path) in chosen.items():
        files = found.ranks.setdefault(rank, RankFiles())
        if kind == "pt.trace":
            files.traces[window] = path
        elif kind == "summary":
            files.summaries[window] = path
        else:
            files.meters[kind] = path
    return found


def _choose(
    found: Folder,
    chosen: dict[tuple[int, str, str], tuple[int, Path]],
    key: tuple[int, str, str],
    new: tuple[int, Path],
) -> None:
    """Keeps the newest of the files that say the same thing, with a note."""
    if key not in chosen:
        chosen[key] = new
        return
    newest, older = max(chosen[key], new), min(chosen[key], new)
    chosen[key] = newest
    found.notes.append(
        f"{printable(older[1].name)} is passed over: {printable(newest[1].name)} is newer, "
        "or comes after it"
    )


def _add_npu(found: Folder, path: Path) -> None:
    """The rank stands in the name of a file that the profiler leaves beside its results."""
    ranks = [
        int(match[1])
        for entry in _entries(path)
        if (match := re.fullmatch(r"profiler_info_(\d{1,7})\.json", entry.name, re.ASCII))
    ]
    if not ranks and (match := re.match(r"rank(\d{1,7})_", path.name, re.ASCII)):
        ranks = [int(match[1])]
    rank = ranks[0] if ranks else _free(found)
    if not ranks:
        found.notes.append(f"{printable(path.name)} does not say its rank: taken as rank {rank}")
    found.ranks.setdefault(rank, RankFiles()).npu.append(path)


def _free(found: Folder) -> int:
    return next(n for n in range(len(found.ranks) + 1) if n not in found.ranks)
