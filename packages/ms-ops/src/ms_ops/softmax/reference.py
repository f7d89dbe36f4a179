"""Softmax under a mask written out: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel


def forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return y."""
    scores = x.to(compute_dtype(x.dtype)) * scale
    out = left_out(x, mask, causal)
    if out is None:
        return torch.softmax(scores, -1).to(x.dtype).contiguous()
    scores = scores.masked_fill(out, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).to(x.dtype).contiguous()


def backward(dy: Tensor, y: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return dx; y is 0 where masked, and so is dx."""
    wide, dwide = (t.to(compute_dtype(y.dtype)) for t in (y, dy))
    dx = wide * (dwide - (dwide * wide).sum(-1, keepdim=True)) * scale
    return dx.to(y.dtype).contiguous()


def left_out(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return bool that broadcasts to x, True where a key is left out; None for nowhere."""
    if not causal:
        return mask
    triangle = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return triangle if mask is None else mask | triangle


BACKEND = Backend("reference", 100, {"scaled_masked_softmax": Kernel(forward, backward)})
