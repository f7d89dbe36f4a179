"""Stand-ins for leaf modules of Megatron that cannot be imported here.

A stub is answered by a finder, so the import system itself binds it; it exists only while the plan
is active, and no other library ever sees a package that is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from mindspeed.patching.errors import PatchError

Builder = Callable[[str], ModuleType]
_MISSING = object()


class _StubLoader(Loader):
    def __init__(self, build: Builder) -> None:
        self._build = build

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = self._build(spec.name)
        if not isinstance(module, ModuleType):
            raise PatchError(f"the stub for {spec.name} must be a module, got {module!r}")
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the builder has filled the module."""


class StubFinder:
    """Answers imports of the stubbed names; everything that was there before comes back."""

    def __init__(self) -> None:
        self._builders: dict[str, Builder] = {}
        self._before: dict[str, tuple[object, object]] = {}

    def add(self, name: str, build: Builder) -> None:
        """Stub a module name until `remove`."""
        self._before[name] = (sys.modules.pop(name, _MISSING), _parent_attribute(name))
        self._builders[name] = build
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self, name: str) -> None:
        """Forget a stub and put back the module and the parent's attribute of before."""
        self._builders.pop(name)
        module, attribute = self._before.pop(name)
        _restore(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules:
            _restore(vars(sys.modules[parent]), leaf, attribute)
        if not self._builders and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of the import protocol."""
        build = self._builders.get(name)
        return None if build is None else ModuleSpec(name, _StubLoader(build), origin="stub")


def _parent_attribute(name: str) -> object:
    parent, _, leaf = name.rpartition(".")
    if parent not in sys.modules:
        return _MISSING
    return vars(sys.modules[parent]).get(leaf, _MISSING)


def _restore(place: dict[str, object] | dict[str, ModuleType], key: str, value: object) -> None:
    if value is _MISSING:
        place.pop(key, None)
    else:
        place[key] = value  # type: ignore[assignment]
