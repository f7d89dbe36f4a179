"""RMSNorm by torch_npu's fused kernel: fp32 inside, one rounding, rstd in fp32.

The kernel takes a low-precision weight of x's dtype or an fp32 one, so that an offset is added in
fp32 and nothing is rounded twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..registry import Backend, Kernel
from . import reference


def forward(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd); "llama" casting normalises with a weight of ones and multiplies after."""
    if x.numel() == 0:
        return reference.forward(x, weight, eps, weight_offset, casting)
    scale = _scale(weight, weight_offset)
    if casting == "llama":
        normed, rstd = npu.op("npu_rms_norm")(x.contiguous(), torch.ones_like(scale), epsilon=eps)
        return (normed.float() * scale).to(x.dtype), rstd
    y, rstd = npu.op("npu_rms_norm")(x.contiguous(), scale, epsilon=eps)
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight); the kernel sums dweight in fp32."""
    if x.numel() == 0:
        return reference.backward(dy, x, weight, rstd, weight_offset, casting)
    scale = _scale(weight, weight_offset)
    dx, dweight = npu.op("npu_rms_norm_backward")(dy.contiguous(), x.contiguous(), scale, rstd)
    return dx, dweight.to(weight.dtype)


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight.contiguous()


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"rms_norm": Kernel(forward, backward, npu.declines)},
    npu.available,
)
