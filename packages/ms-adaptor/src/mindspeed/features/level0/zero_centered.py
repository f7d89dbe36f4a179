"""LayerNorm and RMSNorm whose scale is ``1 + weight``, with ``weight`` starting at zero.

A separate module, because :mod:`mindspeed.features.level0.norm` is read without importing torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class LayerNorm(torch.nn.LayerNorm):
    """``(x - mean) / sqrt(var + eps) * (1 + weight) + bias`` over the last dimension."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x: [..., hidden]``."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * (1 + weight)`` over the last dimension."""

    def reset_parameters(self) -> None:
        """Set weight to zero."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x: [..., hidden]``."""
        return F.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)
