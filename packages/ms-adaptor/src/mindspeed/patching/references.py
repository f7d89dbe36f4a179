"""Who else holds an object that is about to be replaced.

Only module dictionaries are rebound, only under the package of the target, only by identity, and
never for constants. Everything is read through `__dict__`: no attribute access, so no lazy import
and no module `__getattr__` is ever triggered.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator
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
_DEPTH = 4
_WIDTH = 2000


def can_follow(value: object) -> bool:
    """Whether copies of a value can be told by identity; constants are shared by strangers."""
    return not isinstance(value, (*_CONSTANTS, ModuleType))


def _loaded() -> list[tuple[str, ModuleType]]:
    items = list(sys.modules.items())
    return [(name, module) for name, module in items if isinstance(module, ModuleType)]


def _is_under(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def modules_under(root: str) -> list[tuple[str, ModuleType]]:
    """Every loaded module of a package."""
    return [(name, module) for name, module in _loaded() if _is_under(name, root)]


def copies(root: str, value: object) -> list[tuple[ModuleType, str]]:
    """Every module variable under `root` that is `value`."""
    return [
        (module, key)
        for _, module in modules_under(root)
        for key, held in list(vars(module).items())
        if held is value
    ]


def holders_outside(root: str, value: object) -> list[str]:
    """Module variables of other packages that are `value`; they are reported, not changed."""
    return [
        f"{name}:{key} (outside {root})"
        for name, module in _loaded()
        if not _is_under(name, root)
        for key, held in list(vars(module).items())
        if held is value
    ]


def unreachable(
    modules: Iterable[tuple[str, ModuleType]], value: object, own: tuple[object, str]
) -> list[str]:
    """Places that hold `value` where rebinding a name cannot reach it.

    Args:
        modules: where to look.
        value: the object.
        own: owner and name of the patched place itself, which is no finding.

    Returns:
        Readable places: defaults, closures, subclass bases, class attributes, containers, and
        fields of data class instances such as `ModuleSpec`.
    """
    found: list[str] = []
    for name, module in modules:
        for key, held in list(vars(module).items()):
            if held is not value:
                found.extend(_inside(held, value, f"{name}:{key}", name, own, _DEPTH))
    return found


def _inside(
    held: Any, value: object, place: str, module: str, own: tuple[object, str], depth: int
) -> Iterator[str]:
    if depth == 0 or isinstance(held, ModuleType):
        return
    for part, label in _parts(held, module, own):
        if part is value:
            yield f"{place}{label}"
        else:
            yield from _inside(part, value, f"{place}{label}", module, own, depth - 1)


def _parts(held: Any, module: str, own: tuple[object, str]) -> Iterator[tuple[Any, str]]:
    """The objects that `held` refers to, each with a label."""
    if isinstance(held, FunctionType):
        if held.__module__ == module:
            yield from _function_parts(held)
    elif isinstance(held, type):
        if held.__module__ == module:
            yield from _class_parts(held, own)
    elif isinstance(held, (staticmethod, classmethod)):
        yield held.__func__, ""
    elif isinstance(held, dict):
        yield from ((item, f"[{key!r}]") for key, item in list(held.items())[:_WIDTH])
    elif isinstance(held, (list, tuple, set, frozenset)):
        yield from ((item, f"[{index}]") for index, item in enumerate(list(held)[:_WIDTH]))
    elif isinstance(held, functools.partial):
        yield held.func, ".func"
        yield from ((item, f".args[{index}]") for index, item in enumerate(held.args))
        yield from ((item, f".keywords[{key!r}]") for key, item in held.keywords.items())
    elif dataclasses.is_dataclass(held):
        yield from ((item, f".{key}") for key, item in list(vars(held).items()))


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


def _class_parts(cls: type, own: tuple[object, str]) -> Iterator[tuple[Any, str]]:
    for base in cls.__bases__:
        yield base, f" base {base.__qualname__}"
    for key, item in list(vars(cls).items()):
        if (cls, key) != own:
            yield item, f".{key}"
