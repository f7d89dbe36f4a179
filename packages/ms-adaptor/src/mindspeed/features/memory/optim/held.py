"""Optimizers on bf16 parameters that hold the fp32 masters themselves, as Megatron asks for them.

Megatron's distributed optimizer can leave the masters to its inner optimizer: it then gives it
slices of the bf16 weights, gradients as `decoupled_grad`, and reads and writes its state by the
two methods of `HeldMasters`. In checkpoints the masters are plain fp32 as always.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ms_memory.optim import PackedAdamW

# Megatron's name of a master among the states of its parameter.
MASTER = "master_param"


class HeldMasters(Protocol):
    """What this project's wrappers of Megatron's optimizers need of the inner one."""

    def master(self, p: Tensor) -> Tensor:
        """Return a copy of a parameter's masters, fp32."""

    def set_master(self, p: Tensor, master: Tensor) -> None:
        """Store a parameter's masters and round them into its weights."""

    def adopt_weights(self) -> None:
        """Take the weights as the masters."""

    def create_states(self) -> None:
        """Give each parameter the state that its first step starts from."""

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """Return a state by Megatron's name of it, masters in fp32."""

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        """Copy a state in."""


def create_states(optimizer: HeldMasters, config: Any = None) -> None:
    """Megatron's hook for an optimizer that is about to be loaded."""
    del config
    optimizer.create_states()


class HeldPackedAdamW(PackedAdamW):
    """`PackedAdamW` whose state Megatron saves and loads by name.

    State dicts are those of torch's AdamW: step and moments, and no masters.
    """

    @classmethod
    def take_over(cls, adam: torch.optim.Optimizer, **options: Any) -> HeldPackedAdamW:
        """Return an optimizer on the groups of a torch Adam that has not stepped yet.

        Args:
            adam: on bf16 parameters.
            **options: further arguments of the constructor.
        """
        return cls(adam.param_groups, masters_apart=True, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return groups, steps and moments."""
        found = super().state_dict()
        for state in found["state"].values():
            state.pop(MASTER, None)
        return found

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """Return a state of a parameter.

        Args:
            p: the parameter.
            name: its name, "master_param" for a copy of the masters in fp32.
        """
        found: Tensor = self.master(p) if name == MASTER else self.state[p][name]
        return found

    @torch.no_grad()
    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        """Copy a state of a parameter in.

        Args:
            p: the parameter.
            name: its name, "master_param" for masters in fp32. What is no state of it is left out:
                one format brings its own notes along.
            value: of the parameter's shape, or a step.
        """
        state = self._state(p)
        if name == MASTER:
            self.set_master(p, value)
        elif name in state:
            state[name].copy_(value)

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = super()._state(p)
        if MASTER not in state:
            # Megatron lists the states of a parameter; this one's other half is the weight.
            packed, local = self._places[p]
            state[MASTER] = packed.residue_of(local)
        return state
