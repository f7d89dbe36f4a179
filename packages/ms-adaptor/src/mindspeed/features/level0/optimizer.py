"""Megatron's distributed optimizer cannot save, load or resume over torch's own Adam.

It was written for fused Adams that count steps per parameter group. torch counts per parameter, in
a tensor: absent before the first step, missing from checkpoints, and shared by all parameters
after a load, where each parameter then increments it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

_CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_HERE = "mindspeed.features.level0.optimizer"
_TORCH_ADAM = f"{_HERE}:uses_torch_adam"

FEATURE = Feature(
    name="level0.optimizer",
    level=0,
    doc="The distributed optimizer saves, loads and resumes exactly over torch's Adam.",
    patches=(
        Patch(
            target=f"{_CLASS}.state_dict",
            kind="wrap",
            value=f"{_HERE}:wrap_state_dict",
            probe=_TORCH_ADAM,
            reason="It asserts that a step was taken; loading asks for the state before one.",
        ),
        Patch(
            target=f"{_CLASS}._set_main_param_and_optimizer_states",
            kind="wrap",
            value=f"{_HERE}:wrap_set_states",
            probe=_TORCH_ADAM,
            reason="It reads every state name from the checkpoint, which holds no step.",
        ),
        Patch(
            target=f"{_CLASS}.load_state_dict",
            kind="wrap",
            value=f"{_HERE}:wrap_load_state_dict",
            probe=_TORCH_ADAM,
            reason="It gives all parameters one step tensor: n parameters count n steps a step.",
        ),
    ),
)


def uses_torch_adam(module: Any) -> bool:
    """Neither TransformerEngine nor Apex brought a fused Adam."""
    return not module.HAVE_APEX_OR_TE


def wrap_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Create the zero state of step 0 before it is asked for."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        create_state(self.optimizer)
        return original(self)

    return state_dict


def create_state(optimizer: Any) -> None:
    """Give every parameter of a torch Adam the state that its first step would start from."""
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def wrap_set_states(original: Callable[..., None]) -> Callable[..., None]:
    """Keep the step that ``load_state_dict`` took from the checkpoint's parameter groups.

    The parameter state brings none, or, in the format ``dp_reshardable``, that of the loading
    optimizer, which is zero. In fp32 the main parameter is a view of the model's own, so it is
    written without autograd.
    """
    import torch

    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        kept = {"step": state["step"]} if "step" in state else {}
        with torch.no_grad():
            original(self, model_param, {**tensors, **kept})

    return _set_main_param_and_optimizer_states


def wrap_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give each parameter a step tensor of its own after a load."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = original(self, state_dict)
        own_steps(self.optimizer)
        return result

    return load_state_dict


def own_steps(optimizer: Any) -> None:
    """Replace a step tensor shared by parameters by one for each."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()
