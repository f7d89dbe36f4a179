"""SwiGLU by torch_npu's fused kernel, which takes contiguous tensors that are not empty.

With a bias or weights it runs on fp32 tensors, so that the result is rounded once.
"""

from __future__ import annotations

from torch import Tensor

from .. import npu
from ..registry import Backend, Kernel
from . import reference


def forward(x: Tensor, dim: int) -> Tensor:
    """Return silu(a) * b for the halves (a, b) of x along `dim`."""
    if x.numel() == 0:
        return reference.forward(x, dim)
    y: Tensor = npu.op("npu_swiglu")(x.contiguous(), dim=dim)
    return y


def backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return dx from x alone."""
    if x.numel() == 0:
        return reference.backward(dy, x, dim)
    dx: Tensor = npu.op("npu_swiglu_backward")(dy.contiguous(), x.contiguous(), dim=dim)
    return dx


def bias_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Return SwiGLU of x + bias."""
    return forward(x.float() + bias, -1).to(x.dtype)


def bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias)."""
    if x.numel() == 0:
        return reference.bias_backward(dy, x, bias)
    dx = backward(dy.float(), x.float() + bias, -1)
    return dx.to(x.dtype), dx.view(-1, dx.shape[-1]).sum(0).to(bias.dtype)


def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of x times weights [..., 1]."""
    return forward(x.float(), -1).mul_(weights).to(x.dtype)


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dweights)."""
    wide, grad = x.float(), dy.float()
    dweights = (grad * forward(wide, -1)).sum(-1, keepdim=True)
    return backward(grad * weights, wide, -1).to(x.dtype), dweights.to(weights.dtype)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {
        "swiglu": Kernel(forward, backward, npu.declines),
        "bias_swiglu": Kernel(bias_forward, bias_backward, npu.declines),
        "weighted_swiglu": Kernel(weighted_forward, weighted_backward, npu.declines),
    },
    npu.available,
)
