"""Does a patch still fit the Megatron that is installed?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from packaging.version import InvalidVersion, Version

from mindspeed.patching import fingerprints as prints
from mindspeed.patching.records import Patch
from mindspeed.patching.source import (
    SourceError,
    SourceTree,
    installed_source,
    installed_version,
    open_source,
)

NEWEST = "0.16.1"


@dataclass(frozen=True)
class Megatron:
    """One Megatron: version, source where it is at hand, and the records to compare with."""

    version: str
    source: SourceTree | None
    records: tuple[prints.Fingerprint, ...]

    @property
    def in_range(self) -> bool:
        """Whether the version is supported."""
        return prints.in_range(self.version)


@dataclass(frozen=True)
class Verdict:
    """What was found out about one target.

    Attributes:
        found: its facts here.
        problem: why the patch is refused, or empty.
        absent: why the target cannot be here, or empty.
        note: something worth knowing, or empty.
    """

    found: prints.Facts = ()
    problem: str = ""
    absent: str = ""
    note: str = ""


def resolve_megatron(which: str | PathLike[str] = "auto") -> Megatron:
    """The Megatron that a plan is for.

    Args:
        which: `auto` for the installed one (or, without one, the newest recorded version), a
            version such as `0.16.1`, or a path of a wheel or a checkout.

    Raises:
        ValueError: neither a version nor a place with Megatron's source.
    """
    records = prints.recorded()
    if which == "auto":
        source = installed_source()
        version = installed_version(source)
        if version is not None:
            return Megatron(version, source, records)
        return Megatron(records[-1].version if records else NEWEST, None, records)
    if isinstance(which, str) and _is_version(which):
        return Megatron(which, None, records)
    return _at(which, records)


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _at(place: str | PathLike[str], records: tuple[prints.Fingerprint, ...]) -> Megatron:
    try:
        source = open_source(place)
    except SourceError as error:
        raise ValueError(f"megatron={os.fspath(place)!r}: {error}") from error
    if source.version is None:
        raise ValueError(f"megatron={os.fspath(place)!r}: no version in core/package_info.py")
    return Megatron(source.version, source, records)


def verdict(patch: Patch, megatron: Megatron) -> Verdict:
    """Compare a patch's target with what was recorded for it."""
    expected = prints.expected_facts(patch, megatron.version, megatron.records)
    if megatron.source is None:
        found = expected[0] if expected else ()
        return Verdict(found, note="" if expected else "no signature recorded")
    if not prints.part_installed(megatron.source, patch):
        part = ".".join(patch.module.split(".")[:2])
        return Verdict(absent=f"{part} is not installed")
    found = prints.found_facts(megatron.source, patch)
    if expected and found not in expected:
        return Verdict(found, problem=_drift_text(patch, megatron, expected, found))
    if not found and patch.kind != "add":
        return Verdict(found, problem=f"{_here(megatron)} has no {patch.target}")
    return Verdict(found, note="" if expected else "no signature recorded")


def late_problem(patch: Patch, version: str) -> str:
    """Why a patch does not fit a part of Megatron that was not there when the plan was made."""
    found = verdict(patch, Megatron(version, installed_source(), prints.recorded()))
    return found.problem or found.absent


def _here(megatron: Megatron) -> str:
    return f"megatron-core {megatron.version}"


def _drift_text(
    patch: Patch, megatron: Megatron, expected: Sequence[prints.Facts], found: prints.Facts
) -> str:
    wanted = " or ".join(" | ".join(facts) or "no such name" for facts in expected)
    got = " | ".join(found) or "no such name"
    return (
        f"{patch.target} differs in {_here(megatron)}: the patch was checked against {wanted},"
        f" found {got}"
    )
