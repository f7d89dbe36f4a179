"""Megatron's optimizers over inner ones that hold the masters: packed, or on the host."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from mindspeed.features.memory.optim.held import HeldPackedAdamW
from mindspeed.features.memory.optim.held_streamed import HeldStreamed
from mindspeed.features.memory.optim.streamed import TIMES
from mindspeed.features.ops.script import script_arguments

Builder = Callable[..., Any]
# Makes an optimizer that holds the masters from a torch Adam on 16-bit parameters.
Maker = Callable[[torch.optim.Optimizer, Any], Any]

_TORCH_ADAMS = (torch.optim.AdamW, torch.optim.Adam)
_PACKED = "E-M16: --reuse-fp32-param"
_STREAMED = "E-M15: --swap-optimizer"
_packed = HeldPackedAdamW.take_over


def wrap_rna(original: Builder) -> Builder:
    """Build with packed masters; weights round halves away from zero."""
    return _wrap(original, _PACKED, lambda adam, _: _packed(adam, rounding="rna"))


def wrap_rne(original: Builder) -> Builder:
    """Build with packed masters; weights are what a cast of the masters gives."""
    return _wrap(original, _PACKED, lambda adam, _: _packed(adam, rounding="rne"))


def wrap_streamed(original: Builder) -> Builder:
    """Build with masters and moments on the host."""

    def make(adam: torch.optim.Optimizer, config: Any) -> Any:
        return HeldStreamed.take_over(adam, groups=times_of(config) or 1)

    return _wrap(original, _STREAMED, make)


def times_of(config: Any) -> int:
    """Into how many parts a step is cut: of the configuration, else of Megatron-LM's arguments.

    Args:
        config: Megatron's `OptimizerConfig`, which has no field for it but takes an attribute.
    """
    name = "swap_optimizer_times"
    return int(getattr(config, name, script_arguments().get(name, TIMES)))


def _wrap(original: Builder, flag: str, make: Maker) -> Builder:
    """Build with Megatron for an inner optimizer that holds the masters, then put that in."""

    @functools.wraps(original)
    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        held = copy.copy(config)
        # Megatron derives it from a flag that stands for TransformerEngine's Adam.
        held.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        made = original(held, *args, **kwargs)
        if getattr(made, "optimizer", None) is None:
            return made
        _require_torch(made.optimizer, flag)
        if hasattr(made, "float16_groups"):
            return _undivided(made, flag, make, held)
        from mindspeed.features.memory.optim.megatron import HeldDistributedOptimizer

        return HeldDistributedOptimizer.take_over(made, make(made.optimizer, held))

    return build


def _undivided(made: Any, flag: str, make: Maker, config: Any) -> Any:
    wide = sum(len(group) for group in made.fp32_from_fp32_groups)
    if wide:
        raise ValueError(
            f"{flag} with parameters in fp32: {wide} of the model have no masters; need all of them"
            " in bf16 or fp16"
        )
    from mindspeed.features.memory.optim.megatron import HeldFloat16Optimizer

    for group, params in zip(made.optimizer.param_groups, made.float16_groups, strict=True):
        group["params"] = list(params)
    return HeldFloat16Optimizer.take_over(made, make(made.optimizer, config), config)


def _require_torch(adam: Any, flag: str) -> None:
    if type(adam) not in _TORCH_ADAMS:
        kind = type(adam)
        raise ValueError(
            f"{flag} with {kind.__module__}.{kind.__qualname__}: it takes the place of"
            " torch's AdamW, which Megatron uses without TransformerEngine and Apex; leave the flag"
            " out, or uninstall them"
        )
