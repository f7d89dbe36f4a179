"""Rotary position embedding for any device: three passes, no rotated copy of x."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype, upcast
from ..registry import Backend, Kernel


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x * cos + R(x) * sin over the first cos.shape[-1] channels."""
    return _turn(x, cos, sin, interleaved, transposed=False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return dx = dy * cos + R^T(dy * sin); needs neither x nor y."""
    return _turn(dy, cos, sin, interleaved, transposed=True)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    width = cos.shape[-1]
    dtype = compute_dtype(x.dtype)
    source = upcast(x[..., :width])
    wide = torch.empty(x.shape, dtype=dtype, device=x.device)
    target = wide[..., :width]
    cos, sin = cos.to(dtype), sin.to(dtype)
    torch.mul(source, cos, out=target)
    first, second = _pairs(source, interleaved)
    sin_first, sin_second = _pairs(sin, interleaved)
    out_first, out_second = _pairs(target, interleaved)
    if transposed:
        out_first.addcmul_(second, sin_second)
        out_second.addcmul_(first, sin_first, value=-1)
    else:
        out_first.addcmul_(second, sin_first, value=-1)
        out_second.addcmul_(first, sin_second)
    if width != x.shape[-1]:
        wide[..., width:] = x[..., width:]
    return wide.to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


BACKEND = Backend("portable", 90, {"rope": Kernel(forward, backward)})
