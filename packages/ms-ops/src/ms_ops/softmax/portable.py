"""Softmax under a mask on torch's own softmax kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype, upcast
from ..registry import Backend, Facts, Kernel
from .reference import left_out


def forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return y as the reference does."""
    scores = upcast(x) * scale
    out = left_out(x, mask, causal)
    if out is not None:
        scores.masked_fill_(out, -torch.inf)
    y = torch.softmax(scores, -1)
    if out is not None and mask is not None:
        # A row that is all masked is 0 / 0; under the triangle alone every row has a key.
        y.masked_fill_(out, 0.0)
    return y.to(x.dtype).contiguous()


def backward(dy: Tensor, y: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return dx from the saved y; where that is 0, dx is 0 too."""
    wide = upcast(y)
    dx = torch.ops.aten._softmax_backward_data(upcast(dy), wide, -1, compute_dtype(y.dtype))
    scaled: Tensor = dx.mul_(scale).to(y.dtype).contiguous()
    return scaled


def _supports(facts: Facts) -> str | None:
    if facts.device == "npu":
        return "torch's own kernels for NPU tensors belong to the backend 'npu'"
    return None


BACKEND = Backend("portable", 90, {"scaled_masked_softmax": Kernel(forward, backward, _supports)})
