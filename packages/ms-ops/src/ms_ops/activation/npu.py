"""SwiGLU by torch_npu's fused kernel, which takes contiguous tensors that are not empty."""

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


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"swiglu": Kernel(forward, backward, npu.declines)},
    npu.available,
)
