"""Who else holds an object that is about to be replaced.

Only module dictionaries are rebound, only under the package of the target, only by identity, and
never for constants. Everything is read through `__dict__`: no attribute access, so no lazy import
and no module `__getattr__` is ever triggered.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
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

Variable = tuple[ModuleType, str]
# Text of a place, or the place that an object is part of, how such parts are labelled, and by what.
Path = str | tuple["Path", str, object]
Part = tuple[Any, str, object]
Reader = Callable[[Any], Iterable[Part]]


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


class Variables:
    """Module variables by the object that they hold: a package is read once for many searches.

    Good for as long as nothing is imported and variables change by `assign` alone.
    """

    def __init__(self) -> None:
        self._packages: dict[str, dict[int, list[Variable]]] = {}

    def holding(self, root: str, value: object) -> list[Variable]:
        """Every module variable under `root` that is `value`."""
        places = self._package(root).get(id(value), ())
        return [(module, key) for module, key in places if vars(module).get(key) is value]

    def assign(self, root: str, place: Variable, value: object) -> None:
        """Let a variable under `root` hold another object."""
        module, key = place
        vars(module)[key] = value
        places = self._package(root).setdefault(id(value), [])
        if place not in places:
            places.append(place)

    def _package(self, root: str) -> dict[int, list[Variable]]:
        if root not in self._packages:
            found = self._packages[root] = {}
            for _, module in modules_under(root):
                for key, held in list(vars(module).items()):
                    found.setdefault(id(held), []).append((module, key))
        return self._packages[root]


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
        if _is_under(name, root) or _is_under(name, _OWN):
            continue
        # Hardly any module holds one: most are passed over without a step of the interpreter.
        if not search.wanted.keys().isdisjoint(map(id, list(vars(module).values()))):
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
                search.inside(held, (name, ":{}", key), _DEPTH)
    return search.findings


class _Search:
    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.wanted = {id(item.value): item for item in wanted}
        self.places = {item.place for item in wanted}
        self.findings: Findings = {}
        self.module = ""
        # By id, with the type itself, so that it lives: a metaclass may define another hash.
        self._readers: dict[int, tuple[type, Reader | None]] = {}

    def file(self, held: object, place: Path) -> bool:
        item = self.wanted.get(id(held))
        if item is not None:
            self.findings.setdefault(item.target, []).append(_text(place))
        return item is not None

    def inside(self, held: Any, place: Path, depth: int) -> None:
        kind = type(held)
        known = self._readers.get(id(kind))
        if known is None:
            known = self._readers[id(kind)] = (kind, self._reader(kind))
        read = known[1]
        if read is None or depth == 0:
            return
        for part, label, key in read(held):
            where = (place, label, key)
            if id(part) not in self.wanted:
                self.inside(part, where, depth - 1)
            else:
                self.file(part, where)

    def _reader(self, kind: type) -> Reader | None:
        """What yields the objects that one of this type refers to; `None` if it refers to none.

        Decided by the type and read with the base types' own methods: `isinstance` would ask a
        lazy object for its `__class__`, and a subclass may compute what it holds.
        """
        if kind is FunctionType:
            return self._function_parts
        if issubclass(kind, type):
            return self._class_parts
        if kind in (staticmethod, classmethod):
            return lambda held: [(held.__func__, "", None)]
        if issubclass(kind, dict):
            return _items
        for base in (list, tuple, set, frozenset):
            if issubclass(kind, base):
                return functools.partial(_members, base)
        if kind is functools.partial:
            return _partial_parts
        return _field_parts if dataclasses.is_dataclass(kind) else None

    def _function_parts(self, function: FunctionType) -> Iterable[Part]:
        return _function_parts(function) if function.__module__ == self.module else ()

    def _class_parts(self, cls: type) -> Iterable[Part]:
        return _class_parts(cls, self.places) if cls.__module__ == self.module else ()


def _text(place: Path) -> str:
    if isinstance(place, str):
        return place
    whole, label, key = place
    return _text(whole) + label.format(key)


def _items(held: dict[Any, Any]) -> Iterator[Part]:
    return ((item, "[{!r}]", key) for key, item in list(dict.items(held))[:_WIDTH])


def _members(base: Any, held: Any) -> Iterator[Part]:
    items = list(base.__iter__(held))
    return ((item, "[{}]", index) for index, item in enumerate(items[:_WIDTH]))


def _partial_parts(held: functools.partial[Any]) -> Iterator[Part]:
    yield held.func, ".func", None
    yield from ((item, ".args[{}]", index) for index, item in enumerate(held.args))
    yield from ((item, ".keywords[{!r}]", key) for key, item in held.keywords.items())


def _field_parts(held: Any) -> Iterator[Part]:
    for field in dataclasses.fields(held):
        try:
            # Not getattr: a class may compute its fields on access.
            yield object.__getattribute__(held, field.name), ".{}", field.name
        except AttributeError:
            continue  # Never set, or a slot that is still empty.


def _function_parts(function: FunctionType) -> Iterator[Part]:
    for index, item in enumerate(function.__defaults__ or ()):
        yield item, " default {}", index
    for key, item in (function.__kwdefaults__ or {}).items():
        yield item, " default {}", key
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, " closure {}", name
        except ValueError:
            continue  # The cell is still empty.


def _class_parts(cls: type, own: Set[tuple[object, str]]) -> Iterator[Part]:
    for base in cls.__bases__:
        yield base, " base {}", base.__qualname__
    for key, item in list(vars(cls).items()):
        if (cls, key) not in own:
            yield item, ".{}", key
