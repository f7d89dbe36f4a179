"""Scaled dot-product attention with the score matrix written out: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
from .layout import attend, from_bhsd, to_bhsd


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse): out = softmax(scale * q k^T) v, lse = logsumexp of a row's scores."""
    dtype = compute_dtype(q.dtype)
    query, key, value = (to_bhsd(t, layout).to(dtype) for t in (q, k, v))
    scores = _scores(query, key, attend(mask, causal, q, k, layout), scale)
    lse = torch.logsumexp(scores, -1)
    probs = _probabilities(scores, lse)
    out = probs @ _repeat(value, query)
    return from_bhsd(out.to(q.dtype), layout).contiguous(), lse.contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: str,
    scale: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv); dk and dv are summed over the query heads of a group."""
    dtype = compute_dtype(q.dtype)
    query, key, value, y, dy = (to_bhsd(t, layout).to(dtype) for t in (q, k, v, out, dout))
    scores = _scores(query, key, attend(mask, causal, q, k, layout), scale)
    probs = _probabilities(scores, lse)
    dprobs = dy @ _repeat(value, query).transpose(-1, -2)
    dscores = probs * (dprobs - (dy * y).sum(-1, keepdim=True)) * scale
    dq = dscores @ _repeat(key, query)
    dk = _sum_groups(dscores.transpose(-1, -2) @ query, key)
    dv = _sum_groups(probs.transpose(-1, -2) @ dy, value)
    pairs = ((dq, q), (dk, k), (dv, v))
    dq, dk, dv = (from_bhsd(g.to(t.dtype), layout).contiguous() for g, t in pairs)
    return dq, dk, dv


def _scores(query: Tensor, key: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = (query @ _repeat(key, query).transpose(-1, -2)) * scale
    return scores if allowed is None else scores.masked_fill(~allowed, -math.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row without any key has lse = -inf: 0 in its place makes exp(-inf - 0) = 0, not NaN.
    finite = lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    return torch.exp(scores - finite)


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    heads, groups = query.shape[1], x.shape[1]
    return x if heads == groups else x.repeat_interleave(heads // groups, 1)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    batch, heads, rows, channels = grad.shape
    groups = like.shape[1]
    return grad.view(batch, groups, heads // groups, rows, channels).sum(2)


BACKEND = Backend("reference", 100, {"attention": Kernel(forward, backward)})
