"""What is added to scaled scores and which of them are masked, for any block of query rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call
from .layout import PACKED
from .philox import keep_mask


@dataclass(frozen=True)
class Block:
    """Rows [q0, q1) and keys [k0, k1) of score matrices [batch, heads, queries, keys]."""

    batch: int
    heads: int
    queries: int
    keys: int
    q0: int
    q1: int
    k0: int
    k1: int
    device: torch.device


@dataclass(frozen=True)
class _Places:
    """Positions within the sequences: rows [R, 1], keys [1, C], and what belongs to a row."""

    row: Tensor
    key: Tensor
    corner: Tensor | int
    same: Tensor | None = None
    sequence: Tensor | None = None


def whole(batch: int, heads: int, queries: int, keys: int, device: torch.device) -> Block:
    """Return the block that is all of the score matrices."""
    return Block(batch, heads, queries, keys, 0, queries, 0, keys, device)


def allowed(call: Call, block: Block) -> Tensor | None:
    """Return bool that broadcasts to the block [B, H, R, C], True where a query may attend.

    None stands for everywhere.
    """
    mask = None if call.mask is None else _cut(call.mask, block)
    if not call.banded and call.layout != PACKED:
        return mask
    at = _places(call, block)
    seen = _in_band(call, block, at)
    if at.same is not None:
        seen = at.same if seen is None else seen & at.same
    if mask is not None and seen is not None:
        return mask & seen
    return mask if seen is None else seen


def added(call: Call, block: Block, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scaled scores of the block: bias and ALiBi; None for nothing."""
    total = None
    if call.bias is not None:
        total = _cut(call.bias, block).to(dtype) * call.bias_factor
    if call.slopes is not None:
        at = _places(call, block)
        distance = (at.key - at.row + call.slope_shift).abs().to(dtype)
        distance = distance.sqrt() if call.root else distance
        slopes = call.slopes.to(dtype).view(-1, block.heads, 1, 1)
        alibi = -slopes * distance
        total = alibi if total is None else total + alibi
    return total


def additive(call: Call, block: Block, dtype: torch.dtype) -> Tensor | None:
    """Return bias and mask of the block as one tensor of summands [B or 1, H or 1, R, C]."""
    seen, bias = allowed(call, block), added(call, block, dtype)
    if seen is None:
        return bias
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, bias, -math.inf)


def kept(call: Call, block: Block) -> Tensor | None:
    """Return bool [B, H, R, C], True where dropout leaves a weight; None without dropout."""
    if not call.dropout_p or call.rng is None:
        return None
    q_start, kv_start, head = call.starts
    rows = torch.arange(block.q0, block.q1, device=block.device) + q_start
    keys = (block.k0 + kv_start, block.k1 + kv_start)
    return keep_mask(call.rng, call.dropout_p, (block.batch, block.heads), rows, keys, head)


def _cut(x: Tensor, block: Block) -> Tensor:
    """Slice the last two dimensions of a tensor that broadcasts to the scores."""
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    # A slice that takes everything would be recorded in compiled code.
    if x.shape[2] != 1 and (block.q0, block.q1) != (0, block.queries):
        x = x[:, :, block.q0 : block.q1]
    if x.shape[3] != 1 and (block.k0, block.k1) != (0, block.keys):
        x = x[..., block.k0 : block.k1]
    return x


def _places(call: Call, block: Block) -> _Places:
    row = torch.arange(block.q0, block.q1, device=block.device).unsqueeze(1)
    key = torch.arange(block.k0, block.k1, device=block.device).unsqueeze(0)
    lower_right = call.corner == "lower_right"
    if call.cu_q is None or call.cu_k is None:
        return _Places(row, key, block.keys - block.queries if lower_right else 0)
    starts_q, starts_k = call.cu_q.long(), call.cu_k.long()
    of_row, of_key = (
        torch.searchsorted(s[1:].contiguous(), x.contiguous(), right=True)
        for s, x in ((starts_q, row), (starts_k, key))
    )
    count = starts_q.shape[0] - 1
    same = (of_row == of_key) & (of_row < count)
    of_row, of_key = of_row.clamp(max=count - 1), of_key.clamp(max=count - 1)
    corner = (starts_k.diff() - starts_q.diff())[of_row] if lower_right else 0
    return _Places(row - starts_q[of_row], key - starts_k[of_key], corner, same, of_row)


def _in_band(call: Call, block: Block, at: _Places) -> Tensor | None:
    if not call.banded:
        return None
    d = at.key - at.row - at.corner
    left, right = call.window[:2]
    seen = (d >= -left) & (d <= right)
    if len(call.window) > 2:
        odd_left, odd_right, which = call.window[2:]
        odd = _sequence(call, block, at) == which % _sequences(call, block)
        seen = torch.where(odd, (d >= -odd_left) & (d <= odd_right), seen)
    if call.prefix:
        first = torch.tensor(call.prefix, device=block.device)
        first = first if len(call.prefix) == 1 else first[_sequence(call, block, at)]
        seen = seen | (at.key < first)
    return seen


def _sequence(call: Call, block: Block, at: _Places) -> Tensor:
    """Number of each row's sequence: [R, 1] in a pack, [B, 1, 1, 1] in a batch."""
    if at.sequence is not None:
        return at.sequence
    return torch.arange(block.batch, device=block.device).view(-1, 1, 1, 1)


def _sequences(call: Call, block: Block) -> int:
    return block.batch if call.cu_q is None else call.cu_q.shape[0] - 1
