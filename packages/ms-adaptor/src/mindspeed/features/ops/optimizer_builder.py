"""The chosen AdamW in place of the torch Adam that Megatron has built."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from mindspeed.features.ops.optimizer import EMA_DECAY
from ms_ops import FusedAdamW, FusedEmaAdamW

Builder = Callable[..., Any]
_TORCH_ADAMS = (torch.optim.AdamW, torch.optim.Adam)


def wrap_fused(original: Builder) -> Builder:
    """Step a torch Adam by `FusedAdamW`; a fused Adam of another library stays."""

    def choose(adam: Any, config: Any) -> Any:
        del config
        return FusedAdamW.take_over(adam) if type(adam) in _TORCH_ADAMS else adam

    return _wrap(original, choose)


def wrap_torch(original: Builder) -> Builder:
    """Step a torch Adam by torch's own fused step."""

    def choose(adam: Any, config: Any) -> Any:
        del config
        _require_torch(adam, "fused_torch_adamw")
        return fuse(adam)

    return _wrap(original, choose)


def wrap_averaged(original: Builder) -> Builder:
    """Step a torch Adam by `FusedEmaAdamW`."""

    def choose(adam: Any, config: Any) -> Any:
        _require_torch(adam, "fused_ema_adamw")
        return FusedEmaAdamW.take_over(adam, ema_decay=decay_of(config))

    return _wrap(original, choose)


def _wrap(original: Builder, choose: Callable[[Any, Any], Any]) -> Builder:
    """Build with Megatron, then exchange the optimizer inside.

    It comes last because Megatron's wrappers ask for a torch Adam when they are made, and cut its
    groups to this rank's shards.
    """

    @functools.wraps(original)
    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(config, *args, **kwargs)
        inner = getattr(made, "optimizer", None)
        if inner is None or config.optimizer == "sgd":
            return made
        made.optimizer = choose(inner, config)
        if isinstance(made.optimizer, FusedAdamW):
            made.init_state_fn = create_states
        return made

    return build


def create_states(optimizer: FusedAdamW, config: Any = None) -> None:
    """Megatron's hook for an optimizer that is about to be loaded."""
    del config
    optimizer.create_states()


def _require_torch(adam: Any, selection: str) -> None:
    if type(adam) not in _TORCH_ADAMS:
        kind = type(adam)
        raise ValueError(
            f"--optimizer-selection {selection} needs Megatron's path without TransformerEngine and"
            f" Apex, which here brought {kind.__module__}.{kind.__qualname__}: leave the flag out,"
            " or uninstall them"
        )


def decay_of(config: Any) -> float:
    """The decay of the averages: of the optimizer's configuration, else of Megatron-LM's arguments.

    Args:
        config: Megatron's `OptimizerConfig`, which has no field for it but takes an attribute.
    """
    if hasattr(config, "ema_decay"):
        return float(config.ema_decay)
    training = sys.modules.get("megatron.training.global_vars")
    args = None if training is None else vars(training).get("_GLOBAL_ARGS")
    return float(getattr(args, "ema_decay", EMA_DECAY))


def fuse(adam: Any) -> Any:
    """Make a torch Adam use its fused step, without a trace of it in its state dicts."""
    _switch(adam)
    adam.register_state_dict_post_hook(_leave_open)
    adam.register_load_state_dict_post_hook(_switch)
    return adam


def _switch(adam: Any) -> None:
    adam.defaults["fused"] = True
    for group in adam.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state = adam.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, torch.float32)


def _leave_open(adam: Any, state: dict[str, Any]) -> None:
    """A run at level 0 that loads the state is not to take the fused step."""
    del adam
    for group in state["param_groups"]:
        group["fused"] = None
