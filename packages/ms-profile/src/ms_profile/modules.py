"""Which module an operator belongs to, followed by torch's own global module hooks.

Forward: the innermost module that is running. Backward: autograd numbers its nodes as forward makes
them, so the number of the node that runs now tells in which module it was made. The hooks are
installed by the first `watch` and removed by the last `unwatch`.

Limit: autograd runs the backward of an accelerator in a thread of its own, which numbers nodes from
its own start. Nodes that a reentrant checkpoint makes there cannot be told apart by number; their
backward is put to some module of the run, or to none.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.nn.modules import module as hooks

_NO_NUMBER = 2**64 - 1  # autograd's number of a node that sums into a leaf's gradient
_LONGEST = 1 << 20  # entries of the history; the older half is dropped beyond

__all__ = ["current", "is_running", "path_of", "unwatch", "watch"]


class _Watch:
    """Names and history of one span of watching."""

    def __init__(self) -> None:
        self.users = 0
        self.thread = threading.get_ident()
        self.names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.stack: list[str] = []
        # Nodes from number `starts[i]` on were made in module `paths[i]`.
        self.starts: list[int] = []
        self.paths: list[str] = []
        self.handles: tuple[Any, ...] = ()

    def name(self, module: nn.Module) -> str:
        path = self.names.get(module)
        if path is None:
            # The first module that runs is a root; its name is that of its class.
            root = type(module).__name__
            for name, each in module.named_modules():
                self.names.setdefault(each, f"{root}.{name}" if name else root)
            path = self.names[module]
        return path

    def entered(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.name(module))
        self.turn()

    def left(self, module: nn.Module, args: Any, out: Any) -> None:
        path = self.name(module)
        # A module that raised and whose hook was not called leaves its name behind.
        while self.stack and self.stack.pop() != path:
            pass
        self.turn()

    def turn(self) -> None:
        if threading.get_ident() != self.thread:
            return
        start = _get_sequence_nr()
        path = self.stack[-1] if self.stack else ""
        if self.starts and self.starts[-1] >= start:
            self.paths[-1] = path
        else:
            self.starts.append(start)
            self.paths.append(path)
            if len(self.starts) > _LONGEST:
                del self.starts[: _LONGEST // 2], self.paths[: _LONGEST // 2]


_watch: _Watch | None = None
_lock = threading.Lock()


def watch() -> None:
    """Starts to follow modules, or adds one more user."""
    global _watch
    with _lock:
        if _watch is None:
            _watch = _Watch()
            _watch.handles = (
                hooks.register_module_forward_pre_hook(_watch.entered),
                hooks.register_module_forward_hook(_watch.left, always_call=True),
            )
        _watch.users += 1


def unwatch() -> None:
    """Takes one user away; the last one removes the hooks."""
    global _watch
    with _lock:
        if _watch is None:
            raise RuntimeError("modules are not watched")
        _watch.users -= 1
        if _watch.users == 0:
            for handle in _watch.handles:
                handle.remove()
            _watch = None


def path_of(module: nn.Module) -> str:
    """The path that a module is known by while modules are watched; its class's name otherwise."""
    return type(module).__name__ if _watch is None else _watch.name(module)


def is_running() -> bool | None:
    """Whether the forward of some module is running; None while modules are not watched."""
    return None if _watch is None else bool(_watch.stack)


def current() -> str:
    """Path of the module that the work of this moment belongs to; empty when it is none's."""
    watch = _watch
    if watch is None:
        return ""
    if watch.stack:
        return watch.stack[-1]
    node = torch._C._current_autograd_node()
    if node is None or not watch.starts:
        return ""
    number = node._sequence_nr()
    index = bisect_right(watch.starts, number) - 1
    return watch.paths[index] if index >= 0 and number != _NO_NUMBER else ""
