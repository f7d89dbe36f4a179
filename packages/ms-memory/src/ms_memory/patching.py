"""Replaced `forward`s of single modules, put back exactly."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Wrapped:
    """Stands as `forward` in one module; without effect once it is off.

    A deep copy of the module gets the forward of its class: what a session does, it does to its
    model alone.

    Args:
        module: whose forward is replaced.
        make: the original forward -> the new one.
    """

    def __init__(
        self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        # First: it copies the attributes of the original, which may be another of these.
        functools.update_wrapper(self, module.forward)
        self.on = True
        self._module = module
        self._before = module.__dict__.get("forward", _ABSENT)
        self._original = module.forward
        self._new = make(self._original)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the new forward, or the original when this is off."""
        return (self._new if self.on else self._original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the plain forward of the copied module."""
        copied = memo.get(id(self._module), self._module)
        return types.MethodType(type(self._module).forward, copied)

    def undo(self) -> bool:
        """Put the former forward back; False where somebody replaced it since, and it stays."""
        self.on = False
        if self._module.__dict__.get("forward") is not self:
            return False
        if self._before is _ABSENT:
            del self._module.forward
        else:
            self._module.forward = self._before
        return True
