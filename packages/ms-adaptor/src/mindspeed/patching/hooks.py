"""Run something right after a module has been executed for the first time.

One finder stands first in `sys.meta_path` while something is pending. It finds nothing itself: the
finders behind it do, and only the `exec_module` of the loader they return is extended, for one
call. Everything else about the loader (its type, sources, resources) stays as it was.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class _LoaderProxy:
    """Stands before a loader whose attributes cannot be set; forwards all but `exec_module`."""

    def __init__(self, loader: Any, callback: Callback) -> None:
        self._loader = loader
        self._callback = callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._callback(module)


def _extend(loader: Any, callback: Callback) -> Any:
    """The same loader, which calls back once after its next `exec_module`."""
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        original(module)
        callback(module)

    try:
        shadowed = "exec_module" in vars(loader)
        if isinstance(loader, type) or shadowed:
            return _LoaderProxy(loader, callback)
        loader.exec_module = exec_module
    except (AttributeError, TypeError):
        return _LoaderProxy(loader, callback)
    return loader


class ImportHooks:
    """Callbacks that wait for modules to be imported.

    Not pending, not installed: the finder leaves `sys.meta_path` with the last callback.
    """

    def __init__(self) -> None:
        self._pending: dict[str, list[Callback]] = {}
        self._lock = threading.RLock()
        self._searching = threading.local()

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the modules that are waited for."""
        return tuple(self._pending)

    def add(self, module: str, callback: Callback) -> None:
        """Call `callback(module)` right after the module's first execution.

        An error in a callback lets the import fail, so that nobody gets a half-patched module.
        """
        with self._lock:
            self._pending.setdefault(module, []).append(callback)
            # Again on every call: a finder that was put in front meanwhile would hide modules.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)

    def discard(self, module: str, callback: Callback) -> None:
        """Forget a callback; nothing happens if it has fired or was never added."""
        with self._lock:
            callbacks = self._pending.get(module, [])
            if callback in callbacks:
                callbacks.remove(callback)
            self._drop_if_empty(module)

    def _drop_if_empty(self, module: str) -> None:
        if not self._pending.get(module):
            self._pending.pop(module, None)
        if not self._pending and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of the import protocol: the others' spec, with its loader extended."""
        busy: set[str] = self._searching.__dict__.setdefault("names", set())
        if name not in self._pending or name in busy:
            return None
        busy.add(name)
        try:
            spec = _ask_the_others(self, name, path, target)
        finally:
            busy.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _extend(spec.loader, self._fire)
        return spec

    def _fire(self, module: ModuleType) -> None:
        # Callbacks stay pending until all have returned: after a failed import comes another try.
        name = module.__name__
        for callback in list(self._pending.get(name, [])):
            callback(module)
        with self._lock:
            self._pending.pop(name, None)
            self._drop_if_empty(name)


def _ask_the_others(
    asker: ImportHooks, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_spec", None)
        if finder is not asker and find is not None:
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                return spec
    return None
