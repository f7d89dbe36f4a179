"""A checkpoint whose second run somebody else starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import refuse
from .discard import make_replay
from .region import Region
from .replay import RNGS, Rng, Source


class DeferredCheckpoint:
    """One call whose interior is dropped, and computed again when a schedule says so.

        c = DeferredCheckpoint()
        y = c(layer, x)      # keeps x alone
        ...
        c.materialize()      # in a bubble: now the backward finds all that it needs
        y.backward(grad)

    Without `materialize` the backward starts the second run itself, as any checkpoint.

    Args:
        rng: "auto" replays the generators that the call drew from, "always" all, "never" none.
        sources: get and set of the states of all generators that count; None: torch's own.
    """

    def __init__(self, rng: Rng = "auto", *, sources: Sequence[Source] | None = None) -> None:
        if rng not in RNGS:
            raise ValueError(f"DeferredCheckpoint: rng: got {rng!r}, need one of {RNGS}")
        self._rng = rng
        self._sources = sources
        self._region: Region | None = None
        self._called = False

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `fn(*args, **kwargs)`, whatever it is; without gradients the plain call.

        Raises:
            MemoryFeatureError: E-M03, a second call.
        """
        if self._called:
            refuse("E-M03", "a second call", "use one DeferredCheckpoint for each call")
        self._called = True
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self._region = Region(fn, make_replay(tensors, self._sources, self._rng, "replay"))
        return self._region.run(*args, **kwargs)

    @property
    def ready(self) -> bool:
        """Whether a backward finds all that it needs."""
        return self._called and (self._region is None or self._region.ready)

    def materialize(self) -> None:
        """Compute the interior now; nothing when that was done.

        Raises:
            MemoryFeatureError: E-M03, there was no call.
        """
        if not self._called:
            refuse("E-M03", "materialize() before the call", "call the function first")
        if self._region is not None:
            self._region.fill()
