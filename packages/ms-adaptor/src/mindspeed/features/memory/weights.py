"""Linear layers whose weight gradients are added in place, beside hooks on saved tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mindspeed.features.memory.settings import NEEDS_SESSION
from mindspeed.patching.records import Feature, Patch

_LINEAR = "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication"
_HERE = "mindspeed.features.memory.weights"
_REASON = (
    "Where saved tensors pass hooks, backward gets another tensor of the weight's memory: what it"
    " notes there, that the gradient has been added, never reaches the parameter."
)

FEATURE = Feature(
    name="memory.weights",
    level=2,
    doc="--gradient-accumulation-fusion beside recomputation and swapping: backward finds the"
    " parameter itself.",
    when=f"({NEEDS_SESSION}) and gradient_accumulation_fusion",
    packages=("ms-memory",),
    patches=(
        Patch(
            target=f"{_LINEAR}.forward",
            kind="wrap",
            value=f"{_HERE}:wrap_forward",
            reason=_REASON,
        ),
        Patch(
            target=f"{_LINEAR}.backward",
            kind="wrap",
            value=f"{_HERE}:wrap_backward",
            reason=_REASON,
        ),
    ),
    page="docs/memory/megatron.md",
)


class _Saved:
    """The context of a call, whose second saved tensor is the parameter itself."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def saved_tensors(self) -> tuple[Any, Any]:
        total_input, _ = self._ctx.saved_tensors
        return total_input, self._ctx.parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the weight beside what is saved; it lives as long as the model anyway."""

    @functools.wraps(inspect.unwrap(original))
    def forward(ctx: Any, total_input: Any, weight: Any, *args: Any) -> Any:
        ctx.parameter = weight
        return original(ctx, total_input, weight, *args)

    return forward


def wrap_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give backward the weight that forward was given."""

    @functools.wraps(inspect.unwrap(original))
    def backward(ctx: Any, grad_output: Any) -> Any:
        return original(_Saved(ctx), grad_output)

    return backward
