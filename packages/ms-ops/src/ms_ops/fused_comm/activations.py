"""Activations behind the experts' product and their derivatives, in the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import upcast

ACTIVATIONS = ("none", "gelu", "silu", "relu", "fastgelu")
_FAST = 1.702


def activate(z: Tensor, activation: str) -> Tensor:
    """Return act(z) in z's dtype; fastgelu is z * sigmoid(1.702 z)."""
    wide = upcast(z)
    if activation == "gelu":
        wide = F.gelu(wide)
    elif activation == "relu":
        wide = wide.relu()
    else:
        wide = wide * torch.sigmoid(wide if activation == "silu" else _FAST * wide)
    return wide.to(z.dtype)


def activate_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return dy * act'(z) in z's dtype."""
    wide, grad = upcast(z), upcast(dy)
    if activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, wide)
    elif activation == "relu":
        grad = grad * (wide > 0)
    else:
        factor = 1.0 if activation == "silu" else _FAST
        sigmoid = torch.sigmoid(factor * wide)
        grad = grad * sigmoid * (1 + factor * wide * (1 - sigmoid))
    return grad.to(z.dtype)
