"""What eager torch code commonly writes, in the dtype of its inputs: the peer of every operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.layout import attend, from_bhsd, to_bhsd
from ..device import upcast
from ..rope.reference import rotate


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    casting: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd) the way model code writes it: upcast, normalise, cast, multiply."""
    dims = tuple(range(-weight.dim(), 0))
    wide = upcast(x)
    rstd = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + eps)
    y = (wide * rstd).to(x.dtype) * (weight + weight_offset)
    return y.to(x.dtype), rstd


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return silu(a) * b."""
    gate, up = x.chunk(2, dim)
    return F.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return the rotation with cos and sin cast to x's dtype."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    y = turned * cos.to(x.dtype) + rotate(turned, interleaved) * sin.to(x.dtype)
    return torch.cat((y, rest), -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    causal_align: str = "lower_right",
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with the score matrix in the dtype of q."""
    allowed = attend(mask, causal_align if causal else "", q, k, layout)
    query, key, value = (to_bhsd(t, layout) for t in (q, k, v))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    probs = torch.softmax(scores, -1)
    if allowed is not None:
        probs = probs.masked_fill(~allowed, 0.0)
    out = from_bhsd(probs @ value, layout)
    return out, torch.logsumexp(upcast(scores), -1)
