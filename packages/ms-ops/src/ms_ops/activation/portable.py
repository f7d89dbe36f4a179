"""SwiGLU for any device: torch's fused silu kernels, results written in place of the halves.

fp32 needs no temporary tensor. Low precision is upcast block by block, so that the fp32 copies
stay in the processor's cache; a trace takes the tensor whole and leaves that to the compiler.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import LOW_PRECISION
from ..registry import Backend, Kernel

# Elements of x in a block: 1 MiB in fp32.
BLOCK = 1 << 18

_silu = torch.ops.aten.silu
_silu_backward = torch.ops.aten.silu_backward


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
    """Return dx from x alone; silu is computed again instead of saved."""
    dx = x.new_empty(x.shape)
    if x.dtype not in LOW_PRECISION:
        gate, up = x.chunk(2, dim)
        dgate, dup = dx.chunk(2, dim)
        torch.mul(dy, up, out=dgate)
        _silu_backward.grad_input(dgate, gate, grad_input=dgate)
        _silu.out(gate, out=dup)
        dup.mul_(dy)
        return dx
    for (part, grad, out), axis in _blocks(dim, x, dy, dx):
        gate, up = part.chunk(2, axis)
        dgate, dup = out.chunk(2, axis)
        gate, grad = gate.float(), grad.float()
        dup.copy_(F.silu(gate).mul_(grad))
        dgate.copy_(_silu_backward(grad * up, gate))
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
