"""torch_npu's gated activations as documented: fp32 inside, one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .require import need, need_contiguous, need_dtypes


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return silu(a) * b for the halves of x."""
    _check("npu_swiglu", x, dim)
    gate, up = x.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """Return dx."""
    _check("npu_swiglu_backward", x, dim)
    need("npu_swiglu_backward", grad.dtype == x.dtype, "grad_output of x's dtype")
    gate, up = x.float().chunk(2, dim)
    wide, sigmoid = grad.float(), torch.sigmoid(gate)
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, wide * gate * sigmoid), dim).to(x.dtype)


def _check(op: str, x: Tensor, dim: int) -> None:
    need_dtypes(op, x)
    need_contiguous(op, x)
    need(op, x.numel() > 0, "a tensor that is not empty")
    need(op, x.shape[dim] % 2 == 0, "an even size")


KERNELS = {"npu::npu_swiglu": swiglu, "npu::npu_swiglu_backward": swiglu_backward}
