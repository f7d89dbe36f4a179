"""Rotary position embedding for any device: three passes, no rotated copy of x.

Low precision is upcast block by block, so that the fp32 copies stay in the processor's cache; a
trace takes the tensor whole and leaves that to the compiler.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..device import LOW_PRECISION, compute_dtype
from ..registry import Backend, Kernel

# Elements of x in a block: 1 MiB in fp32.
BLOCK = 1 << 18


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x * cos + R(x) * sin over the first cos.shape[-1] channels."""
    return _turn(x, cos, sin, interleaved, transposed=False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return dx = dy * cos + R^T(dy * sin); needs neither x nor y."""
    return _turn(dy, cos, sin, interleaved, transposed=True)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    dtype = compute_dtype(x.dtype)
    cos, sin = cos.to(dtype), sin.to(dtype)
    y = x.new_empty(x.shape)
    if x.dtype not in LOW_PRECISION:
        _write(y, x, cos, sin, interleaved, transposed)
        return y
    for part, cos_part, sin_part, out in _blocks(x, cos, sin, y):
        wide = torch.empty(part.shape, dtype=dtype, device=x.device)
        _write(wide, part.float(), cos_part, sin_part, interleaved, transposed)
        out.copy_(wide)
    return y


def _write(
    y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> None:
    width = cos.shape[-1]
    source, target = x[..., :width], y[..., :width]
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
        y[..., width:] = x[..., width:]


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut all tensors alike along the first dimension; those of size 1 there serve every block."""
    x = tensors[0]
    if any(type(t) is not Tensor for t in tensors) or x.dim() < 2 or x.numel() <= BLOCK:
        return [tensors]
    length = x.shape[0]
    size = max(1, BLOCK * length // x.numel())
    count = -(-length // size)
    parts = (t.split(size) if t.shape[0] == length else (t,) * count for t in tensors)
    return list(zip(*parts, strict=True))


BACKEND = Backend("portable", 90, {"rope": Kernel(forward, backward)})
