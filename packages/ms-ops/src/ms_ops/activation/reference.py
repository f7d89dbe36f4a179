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


def bias_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Return SwiGLU of x + bias."""
    return forward(_sum(x, bias), -1).to(x.dtype)


def bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias): dbias is dx summed over rows before it is rounded."""
    wide = _sum(x, bias)
    dx = backward(dy.to(wide.dtype), wide, -1)
    dbias = dx.reshape(-1, dx.shape[-1]).sum(0) if x.shape[-1] else dx.new_zeros(0)
    return dx.to(x.dtype), dbias.to(bias.dtype)


def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of x times weights [..., 1]."""
    dtype = compute_dtype(x.dtype)
    return (forward(x.to(dtype), -1) * weights.to(dtype)).to(x.dtype)


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dweights): dweights is the sum of dy * swiglu(x) over a row."""
    dtype = compute_dtype(x.dtype)
    wide, grad = x.to(dtype), dy.to(dtype)
    dweights = (grad * forward(wide, -1)).sum(-1, keepdim=True)
    dx = backward(grad * weights.to(dtype), wide, -1)
    return dx.to(x.dtype), dweights.to(weights.dtype)


def _sum(x: Tensor, bias: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return x.to(dtype) + bias.to(dtype)


BACKEND = Backend(
    "reference",
    100,
    {
        "swiglu": Kernel(forward, backward),
        "bias_swiglu": Kernel(bias_forward, bias_backward),
        "weighted_swiglu": Kernel(weighted_forward, weighted_backward),
    },
)
