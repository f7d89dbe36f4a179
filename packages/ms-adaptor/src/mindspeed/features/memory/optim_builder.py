"""Megatron's optimizers with masters packed beside the weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from mindspeed.features.memory.optim_held import HeldPackedAdamW

Builder = Callable[..., Any]
# Makes an optimizer that holds the masters from a torch Adam on bf16 parameters.
Maker = Callable[[torch.optim.Optimizer], Any]

_TORCH_ADAMS = (torch.optim.AdamW, torch.optim.Adam)


def wrap_rna(original: Builder) -> Builder:
    """Build with packed masters; weights round halves away from zero."""
    return _wrap(original, functools.partial(HeldPackedAdamW.take_over, rounding="rna"))


def wrap_rne(original: Builder) -> Builder:
    """Build with packed masters; weights are what a cast of the masters gives."""
    return _wrap(original, functools.partial(HeldPackedAdamW.take_over, rounding="rne"))


def _wrap(original: Builder, make: Maker) -> Builder:
    """Build with Megatron for an inner optimizer that holds the masters, then put that in."""

    @functools.wraps(original)
    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        held = copy.copy(config)
        # Megatron derives it from a flag that stands for TransformerEngine's Adam.
        held.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        made = original(held, *args, **kwargs)
        if getattr(made, "optimizer", None) is None:
            return made
        _require_torch(made.optimizer)
        if hasattr(made, "float16_groups"):
            return _undivided(made, make, held)
        from mindspeed.features.memory.optim_megatron import HeldDistributedOptimizer

        return HeldDistributedOptimizer.take_over(made, make(made.optimizer))

    return build


def _undivided(made: Any, make: Maker, config: Any) -> Any:
    from mindspeed.features.memory.optim_megatron import HeldFloat16Optimizer

    wide = sum(len(group) for group in made.fp32_from_fp32_groups)
    if wide:
        raise ValueError(
            f"E-M40: {wide} parameters of the model are fp32: bf16 parameters are packed only"
        )
    for group, params in zip(made.optimizer.param_groups, made.float16_groups, strict=True):
        group["params"] = list(params)
    return HeldFloat16Optimizer.take_over(made, make(made.optimizer), config)


def _require_torch(adam: Any) -> None:
    if type(adam) not in _TORCH_ADAMS:
        kind = type(adam)
        raise ValueError(
            "E-M15: --reuse-fp32-param needs Megatron's path without TransformerEngine and Apex,"
            f" which here brought {kind.__module__}.{kind.__qualname__}; give"
            " --use-precision-aware-optimizer in its place, or uninstall them"
        )
