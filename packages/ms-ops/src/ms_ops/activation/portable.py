"""SwiGLU for any device: torch's fused silu kernels, results written in place of the halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import LOW_PRECISION, upcast
from ..registry import Backend, Kernel

_silu_backward = torch.ops.aten.silu_backward


def forward(x: Tensor, dim: int) -> Tensor:
    """Return silu(a) * b, computed in fp32 and rounded once."""
    gate, up = x.chunk(2, dim)
    y = F.silu(upcast(gate)).mul_(up)
    return y.to(x.dtype).contiguous()


def backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return dx from x alone; silu is computed again instead of saved."""
    gate, up = (upcast(half) for half in x.chunk(2, dim))
    grad = upcast(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate, dup = dx.chunk(2, dim)
    if x.dtype in LOW_PRECISION:
        dgate.copy_(_silu_backward(grad * up, gate))
        dup.copy_(F.silu(gate).mul_(grad))
    else:
        _silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        torch.mul(F.silu(gate), grad, out=dup)
    return dx


BACKEND = Backend("portable", 90, {"swiglu": Kernel(forward, backward)})
