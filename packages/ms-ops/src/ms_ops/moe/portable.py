"""Permutation of tokens by expert on torch's own kernels.

On CPU and CUDA the sums run in torch's embedding bag, which reads each row once, keeps no gathered
copy, and adds in one order. With a fixed number of rows nothing is read back from a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import upcast
from ..registry import Backend, Kernel
from .index_form import topk
from .plan import (
    inverse,
    is_plain,
    order_by_token,
    places_in_order,
    rows_of,
    starts_of,
    tokens_in_order,
)
from .rows import combine, spread


def permute(tokens: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return (permuted, sorted_indices)."""
    order = indices.reshape(-1).argsort(stable=True)
    permuted = tokens.index_select(0, order[:rows] // max(topk(indices), 1))
    return permuted, inverse(order).to(torch.int32)


def permute_backward(dpermuted: Tensor, sorted_indices: Tensor, tokens: int, k: int) -> Tensor:
    """Return the gradient of the tokens: the sum of those of their rows."""
    return _sum_slots(dpermuted, sorted_indices.reshape(tokens, k), None)


def unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    """Return the weighted sum of each token's rows."""
    shape = (sorted_indices.shape[0], 1) if probs is None else probs.shape
    return _sum_slots(permuted, sorted_indices.reshape(shape), probs)


def unpermute_backward(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    slot = inverse(sorted_indices.long())[:rows]
    k = 1 if probs is None else max(probs.shape[1], 1)
    weight = None if probs is None else probs.reshape(-1)[slot]
    dpermuted, dots = spread(dout, slot // k, weight, permuted)
    if dots is None or probs is None:
        return dpermuted, dout.new_empty(0)
    return dpermuted, _scatter(probs, slot, dots)


def permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    rows: int,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (permuted, permuted_probs, sorted_indices)."""
    token, expert = rows_of(routing_map, rows, drop_and_pad)
    permuted_probs = tokens.new_empty(0) if probs is None else probs[token, expert]
    order = order_by_token(token, routing_map.shape[0])
    return tokens.index_select(0, token), permuted_probs, order.to(torch.int32)


def permute_map_backward(
    dpermuted: Tensor,
    dpermuted_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and of probs (empty without probs)."""
    where = (sorted_indices, routing_map, drop_and_pad)
    dtokens = combine(dpermuted, sorted_indices, starts_of(*where), None)
    if dpermuted_probs is None:
        return dtokens, dpermuted.new_empty(0)
    flat = dpermuted_probs.new_zeros(routing_map.numel())
    flat = flat.scatter_(0, places_in_order(*where), dpermuted_probs[sorted_indices.long()])
    return dtokens, flat.view(routing_map.shape)


def unpermute_map(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    *_: bool,
) -> Tensor:
    """Return the weighted sum of each token's rows."""
    where = (sorted_indices, routing_map, drop_and_pad)
    weights = None if probs is None else probs.reshape(-1)[places_in_order(*where)]
    return combine(permuted, sorted_indices, starts_of(*where), weights)


def unpermute_map_backward(
    dout: Tensor,
    permuted: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    where = (sorted_indices, routing_map, drop_and_pad)
    by_token = sorted_indices.long()
    if probs is None:
        tokens = tokens_in_order(*where)
        token = torch.empty_like(by_token).scatter_(0, by_token, tokens)
        return spread(dout, token, None, None)[0], dout.new_empty(0)
    place = torch.empty_like(by_token).scatter_(0, by_token, places_in_order(*where))
    token = place // max(routing_map.shape[1], 1)
    dpermuted, dots = spread(dout, token, probs.reshape(-1)[place], permuted)
    if dots is None:
        return dpermuted, dout.new_empty(0)
    return dpermuted, _scatter(probs, place, dots)


def _sum_slots(rows: Tensor, slots: Tensor, probs: Tensor | None) -> Tensor:
    """Return the sums over k of the rows that slots [T, k] name; what is not there is zero."""
    tokens, k = slots.shape
    count = rows.shape[0]
    if count == tokens * k:
        weights = None if probs is None else probs.reshape(-1)
        starts = torch.arange(0, tokens * max(k, 1), max(k, 1), device=slots.device)
        return combine(rows, slots.reshape(-1), starts.to(slots.dtype), weights)
    if not is_plain(rows):
        return _sum_masked(rows, slots, probs)
    there = slots < count
    sizes = there.sum(1)
    starts = (sizes.cumsum(0) - sizes).to(slots.dtype)
    weights = None if probs is None else probs[there]
    return combine(rows, slots[there], starts, weights)


def _sum_masked(rows: Tensor, slots: Tensor, probs: Tensor | None) -> Tensor:
    there = slots < rows.shape[0]
    # With a zero row behind the last one no place is out of range, whatever the sizes.
    wide = upcast(rows)
    wide = torch.cat((wide, wide.new_zeros((1, rows.shape[1]))))
    picked = wide[torch.where(there, slots, rows.shape[0]).long()]
    if probs is not None:
        picked = picked * probs.to(wide.dtype).unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


def _scatter(like: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Return zeros of a tensor's shape and dtype with values at flat places."""
    flat = like.new_zeros(like.numel()).scatter_(0, place, values.to(like.dtype))
    return flat.view(like.shape)


BACKEND = Backend(
    "portable",
    90,
    {
        "moe_permute": Kernel(permute, permute_backward),
        "moe_unpermute": Kernel(unpermute, unpermute_backward),
        "moe_permute_map": Kernel(permute_map, permute_map_backward),
        "moe_unpermute_map": Kernel(unpermute_map, unpermute_map_backward),
    },
)
