"""SwiGLU in plain torch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel


def forward(x: Tensor, dim: int) -> Tensor:
    """Return a * sigmoid(a) * b for the halves (a, b) of x along `dim`."""
    gate, up = x.to(compute_dtype(x.dtype)).chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return dx = cat(dy * b * s * (1 + a * (1 - s)), dy * a * s), s = sigmoid(a)."""
    dtype = compute_dtype(x.dtype)
    gate, up = x.to(dtype).chunk(2, dim)
    grad = dy.to(dtype)
    sigmoid = torch.sigmoid(gate)
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    dx = torch.cat((dgate, grad * gate * sigmoid), dim)
    return dx.to(x.dtype).contiguous()


BACKEND = Backend("reference", 100, {"swiglu": Kernel(forward, backward)})
