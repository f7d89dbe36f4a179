"""Megatron hands every small fusion to torch.compile while it is imported, used or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

_HERE = "mindspeed.features.level0.jit"

FEATURE = Feature(
    name="level0.jit",
    level=0,
    doc="A fusion of Megatron meets the compiler when it is first called.",
    patches=(
        Patch(
            target="megatron.core.jit:jit_fuser",
            kind="set",
            value=f"{_HERE}:deferred",
            probe=f"{_HERE}:compiles_at_import",
            reason="It decorates while modules are imported, and with torch.compile that loads the "
            "whole compiler, 2 of the 3.4 seconds that an import of Megatron takes.",
        ),
    ),
)


def compiles_at_import(module: Any) -> bool:
    """The decorator is torch.compile itself."""
    import torch

    return module.jit_fuser is torch.compile


def deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call; inside another compiled region it is part of that."""
    import torch

    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call
