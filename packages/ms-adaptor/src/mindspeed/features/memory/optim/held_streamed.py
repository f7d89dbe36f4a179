"""fp32 masters and moments on the host, under the names that Megatron asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed.features.memory.optim.held import MASTER
from ms_memory.optim import Streamed
from ms_ops import FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


class HeldStreamed(torch.optim.Optimizer):
    """AdamW on 16-bit parameters whose masters and moments pass through the device in each step.

    Between steps both lie on the host, and so do they in `state` and in state dicts, which are
    those of torch's AdamW. The gradient of a parameter is its `decoupled_grad`.
    """

    @classmethod
    def take_over(cls, adam: torch.optim.Optimizer, *, groups: int) -> HeldStreamed:
        """Return an optimizer on the groups of a torch Adam that has not stepped yet.

        Args:
            adam: on 16-bit parameters.
            groups: into how many parts a step is cut.
        """
        return cls(adam.param_groups, groups=groups)

    def __init__(self, params: Any, *, groups: int) -> None:
        """Copy the parameters into fp32 masters and send those to the host.

        Args:
            params: groups with the keys of torch's AdamW.
            groups: into how many parts a step is cut.
        """
        super().__init__(params, {})
        self._masters = {p: _master(p) for group in self.param_groups for p in group["params"]}
        self._weights = {master: p for p, master in self._masters.items()}
        inner = FusedAdamW([self._wide(group) for group in self.param_groups])
        self.streamed = Streamed(inner, groups=groups, keys=MOMENTS, masters=self._publish)

    def _wide(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": [self._masters[p] for p in group["params"]]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the parameters that have a gradient.

        Args:
            closure: computes the loss again.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, wide in zip(self.param_groups, self.streamed.param_groups, strict=True):
            # A schedule writes into the groups here.
            wide.update({k: v for k, v in group.items() if k != "params"})
        for p, master in self._masters.items():
            grad = getattr(p, "decoupled_grad", None)
            master.grad = None if grad is None else grad.detach().float().view(master.shape)
        self.streamed.step()
        for master in self._weights:
            master.grad = None
        self._show()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups, steps and moments; no tensor is copied."""
        found: dict[str, Any] = self.streamed.state_dict()
        groups = [
            {**group, "params": numbered["params"]}
            for group, numbered in zip(self.param_groups, found["param_groups"], strict=True)
        ]
        states = {
            number: {k: v for k, v in state.items() if k != MASTER}
            for number, state in found["state"].items()
        }
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups, steps and moments; nothing passes through the device."""
        states = {
            number: {k: v for k, v in state.items() if k != MASTER}
            for number, state in state_dict["state"].items()
        }
        self.streamed.load_state_dict({**state_dict, "state": states})
        for group, wide in zip(self.param_groups, self.streamed.param_groups, strict=True):
            group.update({k: v for k, v in wide.items() if k != "params"})
        self._show()

    def create_states(self) -> None:
        """Give each parameter without one the state that its first step starts from."""
        found = self.state_dict()
        numbers = [n for group in found["param_groups"] for n in group["params"]]
        for number, p in zip(numbers, self._masters, strict=True):
            if number not in found["state"]:
                zeros = {name: torch.zeros(p.shape, dtype=torch.float32) for name in MOMENTS}
                found["state"][number] = {"step": torch.zeros((), dtype=torch.float32), **zeros}
        self.load_state_dict(found)

    def master(self, p: Tensor) -> Tensor:
        """Return the masters of a parameter, fp32 on the host; not a copy."""
        return self.streamed.master_on_host(self._masters[p])

    @torch.no_grad()
    def set_master(self, p: Tensor, master: Tensor) -> None:
        """Store the masters of a parameter, of its shape; its weights follow from them."""
        kept = self.master(p)
        kept.copy_(master.view(kept.shape))
        p.copy_(kept)

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Take the weights as the masters."""
        for p in self._masters:
            self.master(p).copy_(p)

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """Return a state of a parameter, on the host.

        Args:
            p: the parameter.
            name: its name, "master_param" for the masters.
        """
        self.streamed.sync()
        found: Tensor = self.master(p) if name == MASTER else self.state[p][name]
        return found

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        """Copy a state of a parameter in; what is no state of it is left out.

        Args:
            p: the parameter.
            name: its name, "master_param" for the masters.
            value: of the parameter's shape, or a step.
        """
        if name == MASTER:
            self.set_master(p, value)
        elif name in self.state[p]:
            self.streamed.sync()
            self.state[p][name].copy_(value)

    def _publish(self, masters: list[Tensor]) -> None:
        if masters:
            torch._foreach_copy_([self._weights[m].detach() for m in masters], masters)

    def _show(self) -> None:
        """Let Megatron find the states under the parameters that it knows."""
        for p, master in self._masters.items():
            state = self.streamed.state.get(master)
            if state:
                # A name that Megatron asks for; what it reads is on the host.
                state[MASTER] = master
                self.state[p] = state


def _master(p: Tensor) -> Tensor:
    return p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
