"""Who else holds an object that is about to be replaced.

Only module dictionaries are rebound, only under the package of the target, only by identity, and
never for constants. Everything is read through `__dict__`: no attribute access, so no lazy import
and no module `__getattr__` is ever triggered.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

_CONSTANTS = (
    type(None),
    type(...),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    frozenset,
    range,
    Enum,
)
# Our own glue may hold an original on purpose: a subclass of it, a fall-back to it.
_OWN = "mindspeed"
_DEPTH = 4
_WIDTH = 2000


def can_follow(value: object) -> bool:
    """Whether copies of a value can be told by identity; constants are shared by strangers."""
    return not issubclass(type(value), (*_CONSTANTS, ModuleType))


def _loaded() -> list[tuple[str, ModuleType]]:
    items = list(sys.modules.items())
    return [(name, module) for name, module in items if isinstance(module, ModuleType)]


def _is_under(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def modules_under(root: str) -> list[tuple[str, ModuleType]]:
    """Every loaded module of a package."""
    inside = root + "."
    return [
        (name, module)
        for name, module in list(sys.modules.items())
        # The name first: asking thousands of modules for their type takes as many microseconds.
        if (name == root or name.startswith(inside)) and isinstance(module, ModuleType)
    ]


def copies(root: str, value: object) -> list[tuple[ModuleType, str]]:
    """Every module variable under `root` that is `value`."""
    return [
        (module, key)
        for _, module in modules_under(root)
        for key, held in list(vars(module).items())
        if held is value
    ]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An original whose holders are looked for.

    Attributes:
        target: name under which findings are filed.
        value: the object itself.
        place: owner and name of the patched place, which is no finding.
    """

    target: str
    value: object
    place: tuple[object, str]


Findings = dict[str, list[str]]


def holders_outside(root: str, wanted: Sequence[Wanted]) -> Findings:
    """Module variables of other packages; they are reported, not changed."""
    search = _Search(wanted)
    for name, module in _loaded():
        if not _is_under(name, root) and not _is_under(name, _OWN):
            for key, held in list(vars(module).items()):
                search.file(held, f"{name}:{key} (outside {root})")
    return search.findings


def unreachable(modules: Iterable[tuple[str, ModuleType]], wanted: Sequence[Wanted]) -> Findings:
    """Places that hold an original where rebinding a name cannot reach it.

    Args:
        modules: where to look.
        wanted: the originals, all looked for in one walk.

    Returns:
        Readable places by target: defaults, closures, subclass bases, class attributes,
        containers, and fields of data class instances such as `ModuleSpec`.
    """
    search = _Search(wanted)
    for name, module in modules:
        search.module = name
        for key, held in list(vars(module).items()):
            if id(held) not in search.wanted:
                search.inside(held, f"{name}:{key}", _DEPTH)
    return search.findings


class _Search:
    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted = {id(item.value): item for item in wanted}
        self.places = {item.place for item in wanted}
        self.findings: Findings = {}
        self.module = ""

    def file(self, held: object, place: str) -> bool:
        item = self.wanted.get(id(held))
        if item is not None:
            self.findings.setdefault(item.target, []).append(place)
        return item is not None

    def inside(self, held: Any, place: str, depth: int) -> None:
        if depth == 0:
            return
        for part, label in _parts(held, self.module, self.places):
            if not self.file(part, place + label):
                self.inside(part, place + label, depth - 1)


def _parts(held: Any, module: str, own: Set[tuple[object, str]]) -> Iterator[tuple[Any, str]]:
    """The objects that `held` refers to, each with a label.

    Decided by `type(held)` and read with the base types' own methods: `isinstance` would ask a
    lazy object for its `__class__`, and a subclass may compute what it holds.
    """
    kind = type(held)
    if kind is FunctionType:
        if held.__module__ == module:
            yield from _function_parts(held)
    elif issubclass(kind, type):
        if held.__module__ == module:
            yield from _class_parts(held, own)
    elif kind in (staticmethod, classmethod):
        yield held.__func__, ""
    elif issubclass(kind, dict):
        yield from ((item, f"[{key!r}]") for key, item in list(dict.items(held))[:_WIDTH])
    elif base := next((b for b in (list, tuple, set, frozenset) if issubclass(kind, b)), None):
        items = list(base.__iter__(held))
        yield from ((item, f"[{index}]") for index, item in enumerate(items[:_WIDTH]))
    elif kind is functools.partial:
        yield held.func, ".func"
        yield from ((item, f".args[{index}]") for index, item in enumerate(held.args))
        yield from ((item, f".keywords[{key!r}]") for key, item in held.keywords.items())
    elif dataclasses.is_dataclass(kind):
        yield from _field_parts(held)


def _field_parts(held: Any) -> Iterator[tuple[Any, str]]:
    for field in dataclasses.fields(held):
        try:
            # Not getattr: a class may compute its fields on access.
            yield object.__getattribute__(held, field.name), f".{field.name}"
        except AttributeError:
            continue  # Never set, or a slot that is still empty.


def _function_parts(function: FunctionType) -> Iterator[tuple[Any, str]]:
    for index, item in enumerate(function.__defaults__ or ()):
        yield item, f" default {index}"
    for key, item in (function.__kwdefaults__ or {}).items():
        yield item, f" default {key}"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, f" closure {name}"
        except ValueError:
            continue  # The cell is still empty.


def _class_parts(cls: type, own: Set[tuple[object, str]]) -> Iterator[tuple[Any, str]]:
    for base in cls.__bases__:
        yield base, f" base {base.__qualname__}"
    for key, item in list(vars(cls).items()):
        if (cls, key) not in own:
            yield item, f".{key}"
