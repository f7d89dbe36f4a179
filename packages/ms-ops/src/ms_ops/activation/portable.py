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
    """Return dx from x alone, the gate's half by torch's fused derivative of silu."""
    dx = x.new_empty(x.shape)
    for (part, grad, out), axis in _blocks(dim, x, dy, dx):
        gate, up = part.chunk(2, axis)
        dgate, dup = out.chunk(2, axis)
        gate, grad = upcast(gate), upcast(grad)
        if x.dtype in LOW_PRECISION:
            dgate.copy_(_silu_backward(grad * up, gate))
            dup.copy_(F.silu(gate).mul_(grad))
        else:
            _silu_backward.grad_input(grad * up, gate, grad_input=dgate)
            _silu.out(gate, out=dup)
            dup.mul_(grad)
    return dx


def bias_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Return SwiGLU of x + bias; the sum exists for one block of rows at a time."""
    y = x.new_empty([*x.shape[:-1], x.shape[-1] // 2])
    for (part, out), _ in _blocks(-1, x, y):
        gate, up = torch.add(upcast(part), bias).chunk(2, -1)
        out.copy_(F.silu(gate).mul_(up))
    return y


def bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias); dbias sums what dx is before it is rounded."""
    dx, dbias = x.new_empty(x.shape), upcast(torch.zeros_like(bias))
    for (part, grad, out), _ in _blocks(-1, x, dy, dx):
        wide = torch.add(upcast(part), bias)
        slopes = torch.empty_like(wide)
        _slopes(wide, upcast(grad), slopes, -1)
        out.copy_(slopes)
        dbias = dbias + (slopes.sum(tuple(range(slopes.dim() - 1))) if slopes.dim() > 1 else slopes)
    return dx, dbias.to(bias.dtype)


def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of x times weights [..., 1]."""
    y = x.new_empty([*x.shape[:-1], x.shape[-1] // 2])
    for (part, weight, out), _ in _blocks(-1, x, weights, y):
        gate, up = part.chunk(2, -1)
        out.copy_(F.silu(upcast(gate)).mul_(up).mul_(weight))
    return y


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dweights) with one exponential."""
    dx, dweights = x.new_empty(x.shape), weights.new_empty(weights.shape)
    for (part, weight, grad, out, dweight), _ in _blocks(-1, x, weights, dy, dx, dweights):
        wide = upcast(grad)
        _, up = part.chunk(2, -1)
        silu = _slopes(part, wide * weight, out, -1)
        dweight.copy_(silu.mul_(up).mul_(wide).sum(-1, keepdim=True))
    return dx, dweights


def _slopes(x: Tensor, grad: Tensor, out: Tensor, axis: int) -> Tensor:
    """Write dx into `out` and return silu(a), in the compute dtype, with one exponential.

    With s = sigmoid(a), the slope of silu is s + silu * (1 - s) = lerp(silu, 1, s).
    """
    gate, up = x.chunk(2, axis)
    dgate, dup = out.chunk(2, axis)
    gate = upcast(gate)
    sigmoid = torch.sigmoid(gate)
    silu = sigmoid * gate
    dup.copy_(silu * grad)
    slope = torch.lerp(silu, silu.new_ones(()), sigmoid)
    dgate.copy_(slope.mul_(grad).mul_(up))
    return silu


def _blocks(dim: int, *tensors: Tensor) -> Iterable[tuple[tuple[Tensor, ...], int]]:
    """Yield row blocks of all tensors and the dimension of their halves."""
    x = tensors[0]
    plain = all(type(t) is Tensor and t.is_contiguous() for t in tensors)
    if not plain or x.numel() <= BLOCK or dim not in (-1, x.dim() - 1):
        return [(tensors, dim)]
    rows = max(1, BLOCK // x.shape[-1])
    parts = (t.view(-1, t.shape[-1]).split(rows) for t in tensors)
    return [(block, -1) for block in zip(*parts, strict=True)]


BACKEND = Backend(
    "portable",
    90,
    {
        "swiglu": Kernel(forward, backward),
        "bias_swiglu": Kernel(bias_forward, bias_backward),
        "weighted_swiglu": Kernel(weighted_forward, weighted_backward),
    },
)
