"""SwiGLU for any device, block by block, so that temporaries stay in the processor's cache.

A trace takes the tensor whole and leaves that to the compiler.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import LOW_PRECISION, upcast
from ..registry import Backend, Kernel

# Elements of x in a block: 1 MiB in fp32.
BLOCK = 1 << 18

_silu = torch.ops.aten.silu


def forward(x: Tensor, dim: int) -> Tensor:
    """Return silu(a) * b, computed in fp32 and rounded once."""
    shape = list(x.shape)
    shape[dim] = shape[dim] // 2
    y = x.new_empty(shape)
    if x.dtype not in LOW_PRECISION:
        gate, up = x.chunk(2, dim)
        _silu.out(gate, out=y)
        return y.mul_(up)
    for (part, out), axis in _blocks(dim, x, y):
        gate, up = part.chunk(2, axis)
        out.copy_(F.silu(gate.float()).mul_(up))
    return y


def backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return dx from x alone, with one exponential: s + silu * (1 - s) = lerp(silu, 1, s)."""
    dx = x.new_empty(x.shape)
    for (part, grad, out), axis in _blocks(dim, x, dy, dx):
        gate, up = part.chunk(2, axis)
        dgate, dup = out.chunk(2, axis)
        gate, grad = upcast(gate), upcast(grad)
        sigmoid = torch.sigmoid(gate)
        silu = sigmoid * gate
        dup.copy_(silu * grad)
        slope = torch.lerp(silu, silu.new_ones(()), sigmoid)
        dgate.copy_(slope.mul_(grad).mul_(up))
    return dx


def _blocks(dim: int, *tensors: Tensor) -> Iterable[tuple[tuple[Tensor, ...], int]]:
    """Yield row blocks of all tensors and the dimension of their halves."""
    x = tensors[0]
    plain = all(type(t) is Tensor and t.is_contiguous() for t in tensors)
    if not plain or x.numel() <= BLOCK or dim not in (-1, x.dim() - 1):
        return [(tensors, dim)]
    rows = max(1, BLOCK // x.shape[-1])
    parts = (t.view(-1, t.shape[-1]).split(rows) for t in tensors)
    return [(block, -1) for block in zip(*parts, strict=True)]


BACKEND = Backend("portable", 90, {"swiglu": Kernel(forward, backward)})
