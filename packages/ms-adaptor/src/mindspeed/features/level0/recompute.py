"""Two defects of Megatron's activation recomputation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

_RANDOM = "megatron.core.tensor_parallel.random"
_HERE = "mindspeed.features.level0.recompute"

FEATURE = Feature(
    name="level0.recompute",
    level=0,
    doc="Selective recomputation works without TransformerEngine; recomputing an MLP that "
    "returns its bias does not keep every past graph alive.",
    patches=(
        Patch(
            target=f"{_RANDOM}:CheckpointWithoutOutput.__init__",
            kind="wrap",
            value=f"{_HERE}:wrap_init",
            probe=f"{_HERE}:takes_false_for_fp8",
            reason="fp8=False is read as fp8 on; its callers pass the configuration's False.",
        ),
        Patch(
            target=f"{_RANDOM}:CheckpointFunction.forward",
            kind="wrap",
            value=f"{_HERE}:wrap_forward",
            probe=f"{_HERE}:returns_parameters",
            reason="A Parameter returned by the function becomes the Function's own output: no "
            "longer a leaf, holding the graph of every step so far.",
        ),
    ),
)


def takes_false_for_fp8(module: Any) -> bool:
    """``fp8=False`` counts as fp8."""
    return bool(module.CheckpointWithoutOutput(fp8=False).fp8)


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Read ``fp8`` by its truth instead of by ``is not None``."""

    @functools.wraps(original)
    def __init__(self: Any, fp8: Any = False, *args: Any, **kwargs: Any) -> None:
        original(self, fp8 or None, *args, **kwargs)
        self.fp8 = bool(fp8)

    return __init__


def returns_parameters(module: Any) -> bool:
    """``forward`` hands on what the function returned without looking at it."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    source = torch.zeros(1, requires_grad=True)
    module.checkpoint(lambda x: (x * 1, parameter), False, source)
    return not parameter.is_leaf


def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an alias of each Parameter among the outputs; its gradient flows as before."""
    import torch

    def alias(output: Any) -> Any:
        return output.detach() if isinstance(output, torch.nn.Parameter) else output

    @functools.wraps(inspect.unwrap(original))
    def forward(ctx: Any, *args: Any) -> Any:
        outputs = original(ctx, *args)
        return tuple(map(alias, outputs)) if isinstance(outputs, tuple) else alias(outputs)

    return forward
