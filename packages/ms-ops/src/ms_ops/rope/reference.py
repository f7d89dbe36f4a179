"""Rotary position embedding in plain torch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Return R(x): (-x2, x1) of the halves, or of neighbouring pairs when interleaved."""
    if not interleaved:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x * cos + R(x) * sin over the first cos.shape[-1] channels, the rest unchanged."""
    dtype = compute_dtype(x.dtype)
    width = cos.shape[-1]
    turned, rest = x[..., :width].to(dtype), x[..., width:]
    y = turned * cos.to(dtype) + rotate(turned, interleaved) * sin.to(dtype)
    return torch.cat((y.to(x.dtype), rest), -1).contiguous()


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return dx = dy * cos + R^T(dy * sin); R^T = -R."""
    dtype = compute_dtype(dy.dtype)
    width = cos.shape[-1]
    grad, rest = dy[..., :width].to(dtype), dy[..., width:]
    dx = grad * cos.to(dtype) - rotate(grad * sin.to(dtype), interleaved)
    return torch.cat((dx.to(dy.dtype), rest), -1).contiguous()


BACKEND = Backend("reference", 100, {"rope": Kernel(forward, backward)})
