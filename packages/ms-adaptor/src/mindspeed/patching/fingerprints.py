"""Recorded signatures of every patched name, per megatron-core version.

A record is made by `mindspeed fingerprint --from <wheel or checkout>` and compared when a plan is
made: a name whose signature is not the recorded one is refused, whatever the version number says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mindspeed.patching.facts import facts_of
from mindspeed.patching.records import SUPPORTED_MEGATRON, Patch
from mindspeed.patching.source import SourceTree

RECORDS = Path(__file__).parent / "fingerprints"

Facts = tuple[str, ...]


def in_range(version: str, versions: str = SUPPORTED_MEGATRON) -> bool:
    """Whether a version lies in a range; a release candidate counts as its release."""
    try:
        base = Version(version).base_version
    except InvalidVersion:
        return False
    return SpecifierSet(versions).contains(base)


@dataclass(frozen=True)
class Fingerprint:
    """Signatures of one version.

    Attributes:
        version: of megatron-core.
        targets: facts of each recorded target.
    """

    version: str
    targets: Mapping[str, Facts]


@lru_cache(maxsize=16)
def recorded(folder: Path = RECORDS) -> tuple[Fingerprint, ...]:
    """Every record in a folder, oldest version first."""
    found = []
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        targets = {name: tuple(facts) for name, facts in data["targets"].items()}
        found.append(Fingerprint(data["version"], targets))
    return tuple(sorted(found, key=lambda record: Version(record.version)))


def expected_facts(patch: Patch, version: str, records: Iterable[Fingerprint]) -> list[Facts]:
    """Signatures that are good for a patch at a version; empty if nothing was recorded.

    A recorded version has exactly one. A version between two recorded ones may have the signature
    of any version that the patch was checked against.
    """
    known = [record for record in records if patch.target in record.targets]
    exact = [record.targets[patch.target] for record in known if record.version == version]
    if exact:
        return exact
    checked = (record for record in known if in_range(record.version, patch.versions))
    return list(dict.fromkeys(record.targets[patch.target] for record in checked))


def found_facts(source: SourceTree, patch: Patch) -> Facts:
    """Signature of a patch's target in a source tree; empty where it does not exist."""
    module = source.parse(patch.module)
    if module is None:
        return ()
    return facts_of(module, patch.path) if patch.path else ("module",)


def part_installed(source: SourceTree, patch: Patch) -> bool:
    """Whether the part of Megatron that holds the target is there at all.

    The wheel has only `megatron.core`; `megatron.training` comes with a checkout.
    """
    return source.has_package(".".join(patch.module.split(".")[:2])) or bool(
        source.parse(patch.module)
    )


def make_record(
    sources: Iterable[SourceTree], version: str, patches: Iterable[Patch]
) -> dict[str, Any]:
    """The record of one version for the patches whose range holds it, as plain JSON data.

    Args:
        sources: places that together hold the version, such as a wheel and a checkout.
        version: of megatron-core.
        patches: every patch of the feature table.
    """
    chosen = {p.target: p for p in patches if in_range(version, p.versions)}
    targets: dict[str, list[str]] = {}
    for source in sources:
        for name, patch in sorted(chosen.items()):
            if part_installed(source, patch):
                targets.setdefault(name, list(found_facts(source, patch)))
    return {"version": version, "targets": dict(sorted(targets.items()))}


def write_record(record: dict[str, Any], folder: Path = RECORDS) -> Path:
    """Write a record into a folder and return its file."""
    path = folder / f"{record['version']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    recorded.cache_clear()
    return path
