"""Megatron's distributed optimizer cannot save, load or resume over torch's own Adam.

It was written for fused Adams that count steps per parameter group. torch counts per parameter, in
a tensor: absent before the first step, missing from checkpoints, and shared by all parameters
after a load, where each parameter then increments it.

Over any Adam, the format ``fully_reshardable`` shifts what it saves when buckets are padded.
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
            reason="It asserts that a step was taken; loading asks for the state before one, and a"
            " rank that holds none of the parameters never takes one.",
        ),
        Patch(
            target=f"{_CLASS}._set_main_param_and_optimizer_states",
            kind="wrap",
            value=f"{_HERE}:wrap_set_states",
            probe=_TORCH_ADAM,
            reason="It reads every state name from the checkpoint, which holds no step; the loader "
            "before it gave all parameters one step tensor, which n of them would count n times.",
        ),
        Patch(
            target=f"{_CLASS}.sharded_param_state_fully_reshardable",
            kind="wrap",
            value=f"{_HERE}:wrap_fully_reshardable",
            probe=f"{_HERE}:counts_padding",
            versions=">=0.15,<0.17",
            reason="It looks parameters up at places that count the padding between buckets, in "
            "tensors that have none: from the second bucket on the saved values are shifted.",
        ),
    ),
)


def uses_torch_adam(module: Any) -> bool:
    """Neither TransformerEngine nor Apex brought a fused Adam."""
    return not module.HAVE_APEX_OR_TE


def counts_padding(module: Any) -> bool:
    """The format finds parameters by their places in the padded gradient buffer."""
    save = module.DistributedOptimizer.sharded_param_state_fully_reshardable
    return "param_index_map" in save.__code__.co_names


def wrap_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Create the zero state of step 0 before it is asked for."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        create_state(self.optimizer)
        state = self.optimizer.state
        if state:
            return original(self)
        import torch

        # Nobody saves this one: the first rank of a group has parameters.
        state["no parameter"] = {"step": torch.zeros(())}
        try:
            return original(self)
        finally:
            del state["no parameter"]

    return state_dict


def create_state(optimizer: Any) -> None:
    """Give every parameter of a torch Adam the state that its first step would start from.

    An optimizer that knows its own state is asked for it.
    """
    import torch

    if hasattr(optimizer, "create_states"):
        optimizer.create_states()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "step" not in state:
                # The fused step reads it on the parameter's device.
                place = parameter.device if group.get("fused") else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def wrap_set_states(original: Callable[..., None]) -> Callable[..., None]:
    """Keep the step that ``load_state_dict`` took from the checkpoint's parameter groups.

    It gave all parameters one tensor: here each gets its own. The parameter state brings none, or,
    in the format ``dp_reshardable``, that of the loading optimizer, which is zero. In fp32 the main
    parameter is a view of the model's own, so it is written without autograd.
    """
    import torch

    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        kept = {}
        if "step" in state:
            kept["step"] = state["step"] = state["step"].clone()
        with torch.no_grad():
            original(self, model_param, {**tensors, **kept})

    return _set_main_param_and_optimizer_states


def wrap_fully_reshardable(original: Callable[..., Any]) -> Callable[..., Any]:
    """Look parameters up where they are: at places that count no padding of earlier buckets."""

    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = without_padding(buffer)
            return original(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    return sharded_param_state_fully_reshardable


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Place of each parameter of a gradient buffer: start, end, bucket; buckets end to end."""
    shifts, shift = [], 0
    for bucket in buffer.buckets:
        shifts.append(shift)
        shift += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
