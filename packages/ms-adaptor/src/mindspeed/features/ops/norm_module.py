"""The norm that layer specs build: a module for every setting of Megatron's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

import ms_ops
from mindspeed.features.level0.norm import build_norm


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * (weight_offset + weight)` over the last dimension.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        weight_offset: 1 for zero-centred weights, which then start at zero.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        weight_offset: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weight_offset = weight_offset
        self.epsilon = eps
        super().__init__(hidden_size, eps=eps, dtype=dtype)

    def reset_parameters(self) -> None:
        """Start as the identity up to the norm: weight plus offset is one."""
        torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x: [..., hidden]`."""
        return ms_ops.rms_norm(x, self.weight, self.epsilon, weight_offset=self.weight_offset)


class Norm:
    """What a spec names: calling it builds the norm that the configuration asks for."""

    def __new__(  # type: ignore[misc]
        cls,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        **_: Any,
    ) -> torch.nn.Module:
        """Return RMSNorm on ms_ops, LayerNorm in torch, other kinds as Megatron builds them.

        Args:
            config: reads `normalization`, `layernorm_zero_centered_gamma`, `sequence_parallel`
                and `params_dtype`.
            hidden_size: size of the last dimension.
            eps: added to the variance or mean square.
        """
        if config.normalization == "LayerNorm":
            return build_norm(config, hidden_size, eps)
        if config.normalization != "RMSNorm":
            other: torch.nn.Module = WrappedTorchNorm(config, hidden_size, eps)
            return other
        offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        norm = RMSNorm(hidden_size, eps, offset, config.params_dtype)
        # Megatron sums the gradients of tagged parameters over the tensor-parallel group.
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
