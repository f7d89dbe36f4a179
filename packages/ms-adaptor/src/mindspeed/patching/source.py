"""Megatron's source text and version, found without importing anything of it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.machinery import PathFinder
from pathlib import Path


class SourceError(ValueError):
    """A path does not hold Megatron's source."""


@dataclass(frozen=True)
class SourceTree:
    """Read-only view of one package: folders named like the package, or a wheel.

    Args:
        package: the top-level name, `"megatron"`.
        portions: every folder that is a part of the package (a namespace package has several).
        wheel: a wheel file instead of folders.
    """

    package: str
    portions: tuple[Path, ...] = ()
    wheel: Path | None = None
    _parsed: dict[str, ast.Module | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def parse(self, module: str) -> ast.Module | None:
        """The syntax tree of a dotted module, or `None` where there is no such module."""
        if module not in self._parsed:
            self._parsed[module] = self._find(module)
        return self._parsed[module]

    def has_package(self, name: str) -> bool:
        """Whether a dotted package has a folder here."""
        below = name.split(".")[1:]
        if self.wheel is not None:
            prefix = "/".join(name.split(".")) + "/"
            return any(entry.startswith(prefix) for entry in self._entries)
        return any(portion.joinpath(*below).is_dir() for portion in self.portions)

    @cached_property
    def _entries(self) -> frozenset[str]:
        assert self.wheel is not None
        with zipfile.ZipFile(self.wheel) as archive:
            return frozenset(archive.namelist())

    def _find(self, module: str) -> ast.Module | None:
        parts = module.split(".")
        if parts[0] != self.package:
            return None
        if self.wheel is not None:
            text = self._read_wheel(parts)
            return None if text is None else ast.parse(text)
        for candidate in self._candidates(parts[1:]):
            if candidate.is_file():
                return _parse_file(candidate, candidate.stat().st_mtime_ns)
        return None

    def _read_wheel(self, parts: list[str]) -> str | None:
        assert self.wheel is not None
        stem = "/".join(parts)
        for entry in (f"{stem}.py", f"{stem}/__init__.py"):
            if entry in self._entries:
                with zipfile.ZipFile(self.wheel) as archive:
                    return archive.read(entry).decode("utf-8")
        return None

    def _candidates(self, below: list[str]) -> Iterator[Path]:
        for portion in self.portions:
            base = portion.joinpath(*below)
            if below:
                yield base.with_name(base.name + ".py")
            yield base / "__init__.py"

    @cached_property
    def version(self) -> str | None:
        """megatron-core's version, read statically from `core/package_info.py`."""
        tree = self.parse(f"{self.package}.core.package_info")
        return None if tree is None else _version_of(tree)


@lru_cache(maxsize=256)
def _parse_file(path: Path, modified: int) -> ast.Module:
    # Plans are made several times in one process; Megatron's files are long.
    return ast.parse(path.read_text(encoding="utf-8"))


def _version_of(tree: ast.Module) -> str | None:
    numbers: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    numbers[target.id] = node.value.value
    if not {"MAJOR", "MINOR", "PATCH"} <= numbers.keys():
        return None
    return (
        f"{numbers['MAJOR']}.{numbers['MINOR']}.{numbers['PATCH']}{numbers.get('PRE_RELEASE', '')}"
    )


def open_source(path: str | os.PathLike[str], package: str = "megatron") -> SourceTree:
    """The source in a wheel file, in a checkout, or in a `site-packages` folder.

    Raises:
        SourceError: there is no such package at that place.
    """
    place = Path(path)
    if place.is_file() and zipfile.is_zipfile(place):
        tree = SourceTree(package, wheel=place.resolve())
    else:
        portion = place if place.name == package else place / package
        tree = SourceTree(package, portions=(portion.resolve(),))
    if not tree.has_package(package):
        raise SourceError(f"{place}: no {package}/ package there; give a wheel or a folder")
    return tree


def installed_source(package: str = "megatron") -> SourceTree | None:
    """The source that `import megatron` would find, or `None`; nothing is imported."""
    portions = _portions(package)
    return SourceTree(package, portions=portions) if portions else None


def _portions(package: str) -> tuple[Path, ...]:
    # The path finder alone is asked first: other finders may run code, ours included.
    spec = PathFinder.find_spec(package, sys.path)
    if spec is None:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            return ()
    if spec is None or spec.submodule_search_locations is None:
        return ()
    return tuple(Path(place) for place in spec.submodule_search_locations)


def installed_version(tree: SourceTree | None, distribution: str = "megatron-core") -> str | None:
    """Version of the Megatron in `tree`; that of the distribution where the source is silent."""
    if tree is None:
        return None
    if tree.version is not None:
        return tree.version
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
