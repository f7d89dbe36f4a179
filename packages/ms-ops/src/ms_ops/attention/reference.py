"""Scaled dot-product attention with the score matrix written out: the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
from .call import Call
from .layout import from_bhsd, lse_from_bhs, lse_to_bhs, to_bhsd
from .pattern import added, allowed, kept, whole


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse): out = softmax(scores) v, lse = logsumexp of a row's scores and sink."""
    call = Call(*rest)
    query, key, value = _wide(call, q, k, v)
    scores = _scores(call, query, key)
    lse = torch.logsumexp(scores, -1)
    if call.sink is not None:
        lse = torch.logaddexp(lse, call.sink.to(lse.dtype).view(1, -1, 1))
    probs = _probabilities(scores, lse) * _dropout(call, query, key)
    out = probs @ _repeat(value, query)
    out = from_bhsd(out.to(q.dtype), call.layout).contiguous()
    return out, lse_from_bhs(lse, call.layout).contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dbias, dsink); the last two are empty when nobody asks for them."""
    call, bias_grad = Call(*rest[:-1]), rest[-1]
    query, key, value, y, dy = _wide(call, q, k, v, out, dout)
    lse = lse_to_bhs(lse, call.layout)
    keep = _dropout(call, query, key)
    probs = _probabilities(_scores(call, query, key), lse)
    dprobs = (dy @ _repeat(value, query).transpose(-1, -2)) * keep
    delta = (dy * y).sum(-1, keepdim=True)
    dscores = probs * (dprobs - delta)
    dq = dscores @ _repeat(key, query) * call.scale
    dk = _sum_groups(dscores.transpose(-1, -2) @ query, key) * call.scale
    dv = _sum_groups((probs * keep).transpose(-1, -2) @ dy, value)
    pairs = ((dq, q), (dk, k), (dv, v))
    dq, dk, dv = (from_bhsd(g.to(t.dtype), call.layout).contiguous() for g, t in pairs)
    dbias, dsink = q.new_empty(0), q.new_empty(0)
    if bias_grad and call.bias is not None:
        dbias = (dscores * call.bias_factor).sum_to_size(call.bias.shape).to(call.bias.dtype)
    if call.sink is not None:
        dsink = sink_gradient(call.sink, lse, delta.squeeze(-1))
    return dq, dk, dv, dbias, dsink


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return dsink [H] from the log-sum-exp and sum(dout * out), both [B, H, S]."""
    weight = torch.exp(sink.to(lse.dtype).view(1, -1, 1) - finite(lse))
    return -(weight * delta).sum((0, 2)).to(sink.dtype)


def finite(lse: Tensor) -> Tensor:
    """Return the log-sum-exp with 0 in rows without any key: exp(-inf - 0) is 0, not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _wide(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(to_bhsd(t, call.layout).to(compute_dtype(t.dtype)) for t in tensors)


def _scores(call: Call, query: Tensor, key: Tensor) -> Tensor:
    scores = (query @ _repeat(key, query).transpose(-1, -2)) * call.scale
    batch, heads, rows, keys = scores.shape
    block = whole(batch, heads, rows, keys, scores.device)
    bias, seen = added(call, block, scores.dtype), allowed(call, block)
    scores = scores if bias is None else scores + bias
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(scores - finite(lse).unsqueeze(-1))


def _dropout(call: Call, query: Tensor, key: Tensor) -> Tensor | float:
    batch, heads, rows, _ = query.shape
    keep = kept(call, whole(batch, heads, rows, key.shape[2], query.device))
    if keep is None:
        return 1.0
    return keep.to(query.dtype) * (0.0 if call.dropout_p == 1 else 1 / (1 - call.dropout_p))


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    heads, groups = query.shape[1], x.shape[1]
    return x if heads == groups else x.repeat_interleave(heads // groups, 1)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    batch, heads, rows, channels = grad.shape
    groups = like.shape[1]
    return grad.view(batch, groups, heads // groups, rows, channels).sum(2)


BACKEND = Backend("reference", 100, {"attention": Kernel(forward, backward)})
