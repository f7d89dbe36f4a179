"""Attention block by block: rows of the score matrix, and of those only the keys they see.

What torch's kernels cannot do in one call (windows, ALiBi, bias, rectangles, dropout) runs over
blocks of query rows, so that no tensor of Sq x Sk is held. A block is either one call of torch's
CPU flash kernel with the block's bias and mask as summands, or written out (`dense_*`), which any
device, dropout and the gradient of a bias need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..masks import UNBOUNDED
from .call import Call
from .pattern import Block, additive, kept

# Elements of a block's scores, over all heads and batch entries that differ: 16 MiB in fp32.
BUDGET = 2**22
LEAST_ROWS = 16
# A band is cut finer than memory asks for, so that blocks leave out what no row of them sees.
BAND_ROWS = 128


def row_blocks(call: Call, q: Tensor, k: Tensor, width: int) -> Iterator[Block]:
    """Cut the score matrices [B, H, Sq, Sk] of q and k into blocks of rows.

    Args:
        call: the call's arguments.
        q: [B, H, Sq, D].
        k: [B, Hk, Sk, D].
        width: how many score matrices a block holds at the same time.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if isinstance(queries, torch.SymInt) or isinstance(keys, torch.SymInt):
        yield Block(batch, heads, queries, keys, 0, queries, 0, keys, q.device)
        return
    step = max(LEAST_ROWS, BUDGET // max(1, width * keys))
    if call.banded:
        step = min(step, BAND_ROWS)
    for start in range(0, queries, step):
        stop = min(queries, start + step)
        low, high = _keys(call, batch, (start, stop), (queries, keys))
        yield Block(batch, heads, queries, keys, start, stop, low, high, q.device)


def _keys(call: Call, batch: int, rows: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the keys outside of which no row of the block sees anything, in any sequence."""
    if not call.banded or call.cu_q is not None:
        return 0, shape[1]
    corner = shape[1] - shape[0] if call.corner == "lower_right" else 0
    bounds = {call.bounds(i, batch) for i in range(max(batch, 1))}
    left, right = max(b[0] for b in bounds), max(b[1] for b in bounds)
    low = 0 if left == UNBOUNDED else max(0, rows[0] + corner - left)
    high = shape[1] if right == UNBOUNDED else min(shape[1], rows[1] + corner + right)
    prefix = min(max(call.prefix, default=0), shape[1])
    if prefix:
        low, high = 0, max(high, prefix)
    return min(low, shape[1]), max(high, min(low, shape[1]))


def summand_width(call: Call, q: Tensor, flash: bool) -> int:
    """Return how many score matrices a block holds: a flash kernel only needs its summands."""
    batch, heads = q.shape[:2]
    if not flash:
        return batch * heads
    summands = [t for t in (call.bias, call.mask) if t is not None]
    apart = [math.prod(t.shape[:-2]) for t in summands]
    return max(1, *apart, heads if call.slopes is not None else 1)


def cut(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's rows of q and its keys and values."""
    # Slices that take everything are left out: compiled code would hold them.
    if (block.q0, block.q1) != (0, block.queries):
        q = q[:, :, block.q0 : block.q1]
    if (block.k0, block.k1) != (0, block.keys):
        k, v = (t[:, :, block.k0 : block.k1] for t in (k, v))
    return q, k, v


def summand(call: Call, block: Block, query: Tensor) -> Tensor | None:
    """Return what a flash kernel adds to the block's scores: bias and mask."""
    bias = additive(call, block, query.dtype)
    if bias is None:
        return None
    return bias.expand(*bias.shape[:2], query.shape[2], block.k1 - block.k0)


def dense_forward(
    call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a block.

    Args:
        call: the call's arguments.
        block: which part of the score matrices this is.
        q: [B, H, R, D], the block's rows, in the dtype of the arithmetic.
        k: [B, Hk, C, D], the block's keys.
        v: [B, Hk, C, Dv].
    """
    scores = _scores(call, block, q, k)
    lse = torch.logsumexp(scores, -1)
    # exp(scores - lse) would carry the rounding of lse into every weight.
    probs = torch.softmax(scores, -1)
    keep = kept(call, block)
    if keep is not None:
        probs = probs * _factor(call, keep, probs)
    out = (_grouped(probs, k) @ v).view(*q.shape[:3], v.shape[-1])
    # A row without any key: the weights are 0 / 0.
    return out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0), lse


def dense_backward(
    call: Call,
    block: Block,
    tensors: tuple[Tensor, ...],
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, ds) of a block; ds [B, H, R, C] is the gradient of the scores.

    Args:
        call: the call's arguments.
        block: which part of the score matrices this is.
        tensors: dout, q, k, v and out of the block, in the dtype of the arithmetic.
        lse: [B, H, R], no infinities.
    """
    dout, q, k, v, out = tensors
    probs = torch.exp(_scores(call, block, q, k) - lse.unsqueeze(-1))
    dprobs = (_grouped(dout, k) @ v.transpose(-1, -2)).view_as(probs)
    keep = kept(call, block)
    weights = probs
    if keep is not None:
        factor = _factor(call, keep, probs)
        dprobs, weights = dprobs * factor, probs * factor
    dscores = probs * (dprobs - (dout * out).sum(-1, keepdim=True))
    by_group = _grouped(dscores, k)
    dq = (by_group @ k).view_as(q) * call.scale
    dk = by_group.transpose(-1, -2) @ _grouped(q, k) * call.scale
    dv = _grouped(weights, k).transpose(-1, -2) @ _grouped(dout, k)
    return dq, dk, dv, dscores


def _scores(call: Call, block: Block, q: Tensor, k: Tensor) -> Tensor:
    scores = _grouped(q, k) @ k.transpose(-1, -2) * call.scale
    scores = scores.view(*q.shape[:3], k.shape[2])
    bias = additive(call, block, scores.dtype)
    return scores if bias is None else scores + bias


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """View [B, H, R, X] as [B, Hk, H / Hk * R, X]: the heads of a group share their keys."""
    batch, heads, rows, width = x.shape
    groups = k.shape[1]
    return x.reshape(batch, groups, heads // groups * rows, width)


def _factor(call: Call, keep: Tensor, like: Tensor) -> Tensor:
    """Return what dropout multiplies each weight with."""
    return keep.to(like.dtype) * (0.0 if call.dropout_p == 1 else 1 / (1 - call.dropout_p))
