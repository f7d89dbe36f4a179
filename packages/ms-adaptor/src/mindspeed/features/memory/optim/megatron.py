"""Megatron's two optimizers of 16-bit models, over an inner one that holds the masters itself."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from torch import Tensor

from mindspeed.features.memory.optim.held import create_states

MASTERS = "fp32_from_fp16_params"  # Megatron's name of them in a state dict


class HeldFloat16Optimizer(Float16OptimizerWithFloat16Params):
    """`Float16OptimizerWithFloat16Params` without masters of its own.

    Its parameters are the model's bf16 parameters; their gradients for the step are
    `decoupled_grad`. State dicts, sharded or not, are Megatron's, with masters in fp32.
    """

    @classmethod
    def take_over(cls, made: Any, inner: Any, config: Any) -> HeldFloat16Optimizer:
        """Return an optimizer in the place of one that Megatron has just built.

        Args:
            made: Megatron's. Its masters are not used and go with it.
            inner: of `optim.held`, on the bf16 parameters of `made`, group by group.
            config: says that gradients are `decoupled_grad`.
        """
        held = cls(inner, config, made.grad_scaler, create_states)
        for p in held._all():
            # Whoever asks for it would read masters that are no more.
            del p.main_param
        # Groups of ranks that Megatron sets from outside.
        held.__dict__ = {**vars(made), **vars(held)}
        return held

    def __init__(self, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any) -> None:
        """Build it as Megatron builds its own.

        Args:
            optimizer: of `optim.held`.
            config: Megatron's `OptimizerConfig`.
            grad_scaler: None or Megatron's.
            init_state_fn: called before states are loaded.
        """
        # That of the parent makes the masters.
        MixedPrecisionOptimizer.__init__(self, optimizer, config, grad_scaler, init_state_fn)
        self.is_stub_optimizer = False
        self.float16_groups = [list(g["params"]) for g in optimizer.param_groups]
        self.fp32_from_float16_groups: list[list[Tensor]] = [[] for _ in self.float16_groups]
        self.fp32_from_fp32_groups: list[list[Tensor]] = [[] for _ in self.float16_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero the gradients of the model and those of the step."""
        super().zero_grad(set_to_none)
        for p in self._all():
            # They are the gradient buffer's own, or copies of this step.
            p.decoupled_grad = None

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Return Megatron's state dict; its masters are fp32 copies."""
        state: dict[str, Any] = super().state_dict(is_loading)
        state[MASTERS] = [[self.optimizer.master(p) for p in g] for g in self.float16_groups]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state dict of Megatron's; the weights follow from its masters."""
        super().load_state_dict(state_dict)
        masters = state_dict[MASTERS if MASTERS in state_dict else "fp32_from_fp16"]
        for group, saved in zip(self.float16_groups, masters, strict=True):
            for p, master in zip(group, saved, strict=True):
                self.optimizer.set_master(p, master.data)

    def _copy_model_grads_to_main_grads(self) -> None:
        for p in self._all():
            found = getattr(p, "main_grad", p.grad)
            p.decoupled_grad = None if found is None else found.float()
            p.grad = None

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        return [p.decoupled_grad for p in self._all() if p.decoupled_grad is not None]

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        if state_dict is not None:
            raise ValueError(
                "reload_model_params: state_dict: masters start from the weights of the model;"
                " load the optimizer's own state for others"
            )
        self.optimizer.adopt_weights()

    def _all(self) -> list[Any]:
        return [p for group in self.float16_groups for p in group]


class HeldDistributedOptimizer(DistributedOptimizer):
    """`DistributedOptimizer` whose masters follow weights that are loaded, and the other way.

    That its inner optimizer holds the masters Megatron knows by itself.
    """

    @classmethod
    def take_over(cls, made: Any, inner: Any) -> HeldDistributedOptimizer:
        """Return an optimizer in the place of one that Megatron has just built.

        Args:
            made: Megatron's, built for an inner optimizer that holds the masters.
            inner: of `optim.held`, on the slices of the weights in `made`.
        """
        held = cls.__new__(cls)
        held.__dict__ = {**vars(made), "optimizer": inner, "init_state_fn": create_states}
        for chunk in made.model_chunks:
            for p in chunk.parameters():
                if getattr(p, "main_param", p) is None:
                    # Logs of norms would take it for no weight at all.
                    del p.main_param
        return held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state dict of Megatron's; the weights follow from its masters."""
        super().load_state_dict(state_dict)
        self._gather()

    def load_parameter_state(self, filename: str, **options: Any) -> None:
        """Take a file of parameter states; the weights follow from its masters."""
        super().load_parameter_state(filename, **options)
        self._gather()

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        if state_dict is None:
            # Megatron does nothing here, and the masters would stay those of former weights.
            self.optimizer.adopt_weights()
            return
        found = self._build_model_param_to_state_dict_param_map(state_dict)
        for params, parts in zip(self.model_float16_groups, self.shard_float16_groups, strict=True):
            for p, part in zip(params, parts, strict=True):
                own = self._get_model_param_range_map(p)["param"]
                self.optimizer.set_master(part, found[p].reshape(-1)[own.start : own.end])
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """Bring this rank's part of the weights to the others: they may be rounded anew."""
        for chunk in self.model_chunks:
            if chunk.ddp_config.overlap_param_gather:
                # A gather of the former weights may be under way: this one only ends it.
                chunk.start_param_sync(force_sync=True)
            chunk.start_param_sync(force_sync=True)
