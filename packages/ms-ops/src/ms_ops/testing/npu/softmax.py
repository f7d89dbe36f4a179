"""torch_npu's softmax under a mask as documented, with either reading of masked places."""

from __future__ import annotations

import torch
from torch import Tensor

from .readings import reading
from .require import need, need_contiguous, need_dtypes

FILL = -10000.0


def forward(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    """Return y; a row that is all masked is the mean, or not a number with a fill of -inf."""
    _check(x, mask, fixed_triu_mask)
    fill = FILL if reading().empty_rows == "uniform" else -torch.inf
    return torch.softmax((x.float() * scale).masked_fill(mask, fill), -1).to(x.dtype)


def backward(
    y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    """Return dx."""
    _check(y, mask, fixed_triu_mask)
    need("npu_scaled_masked_softmax_backward", y_grad.dtype == y.dtype, "y_grad of y's dtype")
    wide, dwide = y.float(), y_grad.float()
    return (wide * (dwide - (dwide * wide).sum(-1, keepdim=True)) * scale).to(y.dtype)


def _check(x: Tensor, mask: Tensor, fixed_triu_mask: bool) -> None:
    op = "npu_scaled_masked_softmax"
    need_dtypes(op, x)
    need_contiguous(op, x, mask)
    need(op, mask.dtype is torch.bool and not fixed_triu_mask, "a bool mask, given")
    sizes = x.shape[2:]
    fits = x.dim() == 4 and all(32 <= n <= 4096 and n % 32 == 0 for n in sizes)
    need(op, fits, f"[N, C, H, W] with H and W from 32 to 4096 in steps of 32: {tuple(x.shape)}")


KERNELS = {
    "npu::npu_scaled_masked_softmax": forward,
    "npu::npu_scaled_masked_softmax_backward": backward,
}
