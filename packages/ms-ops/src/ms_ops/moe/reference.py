"""Permutation of tokens by expert in plain torch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
from .index_form import topk
from .plan import check_map_rows


def permute(tokens: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return (permuted, sorted_indices)."""
    order = indices.reshape(-1).argsort(stable=True)
    permuted = tokens[order[:rows] // max(topk(indices), 1)]
    return permuted, order.argsort().to(torch.int32)


def permute_backward(dpermuted: Tensor, sorted_indices: Tensor, tokens: int, k: int) -> Tensor:
    """Return the gradient of the tokens: the sum of those of their rows."""
    slots = sorted_indices.reshape(tokens, k)
    return _with_zero_row(dpermuted)[_kept(slots, dpermuted)].sum(1).to(dpermuted.dtype)


def unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    """Return the weighted sum of each token's rows."""
    weights = _weights(permuted, sorted_indices, probs)
    slots = _kept(sorted_indices.reshape(weights.shape[:2]), permuted)
    return (_with_zero_row(permuted)[slots] * weights).sum(1).to(permuted.dtype)


def unpermute_backward(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    weights = _weights(dout, sorted_indices, probs)
    slots = sorted_indices.reshape(weights.shape[:2]).clamp(max=rows).long()
    wide = dout.to(weights.dtype).unsqueeze(1)
    dpermuted = wide.new_zeros((rows + 1, dout.shape[1]))
    dpermuted = dpermuted.index_put((slots,), wide * weights)[:rows].to(dout.dtype)
    if permuted is None or probs is None:
        return dpermuted.contiguous(), dout.new_empty(0)
    dprobs = (_with_zero_row(permuted)[slots] * wide).sum(-1)
    return dpermuted.contiguous(), dprobs.to(probs.dtype)


def permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    rows: int,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (permuted, permuted_probs, sorted_indices)."""
    token, expert = _rows_of(routing_map, rows, drop_and_pad)
    permuted_probs = tokens.new_empty(0) if probs is None else probs[token, expert]
    return tokens[token], permuted_probs, token.argsort(stable=True).to(torch.int32)


def permute_map_backward(
    dpermuted: Tensor,
    dpermuted_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and of probs (empty without probs)."""
    dtokens = unpermute_map(dpermuted, sorted_indices, routing_map, None, drop_and_pad)
    if dpermuted_probs is None:
        return dtokens, dpermuted.new_empty(0)
    token, expert = _rows_of(routing_map, dpermuted.shape[0], drop_and_pad)
    dprobs = dpermuted_probs.new_zeros(routing_map.shape)
    return dtokens, dprobs.index_put((token, expert), dpermuted_probs)


def unpermute_map(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    *_: bool,
) -> Tensor:
    """Return the weighted sum of each token's rows."""
    token, expert = _rows_of(routing_map, permuted.shape[0], drop_and_pad)
    wide = permuted.to(compute_dtype(permuted.dtype))
    if probs is not None:
        wide = wide * probs[token, expert].to(wide.dtype).unsqueeze(1)
    order = sorted_indices.long()
    out = wide.new_zeros((routing_map.shape[0], permuted.shape[1]))
    return out.index_add(0, token[order], wide[order]).to(permuted.dtype)


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
    token, expert = _rows_of(routing_map, sorted_indices.shape[0], drop_and_pad)
    wide = dout.to(compute_dtype(dout.dtype))[token]
    weight = 1.0 if probs is None else probs[token, expert].to(wide.dtype).unsqueeze(1)
    dpermuted = (wide * weight).to(dout.dtype)
    if permuted is None or probs is None:
        return dpermuted, dout.new_empty(0)
    dots = (wide * permuted.to(wide.dtype)).sum(1).to(probs.dtype)
    return dpermuted, probs.new_zeros(probs.shape).index_put((token, expert), dots)


def _with_zero_row(rows: Tensor) -> Tensor:
    """Return the rows in the compute dtype with a zero row behind the last one."""
    wide = rows.to(compute_dtype(rows.dtype))
    return torch.cat((wide, wide.new_zeros((1, rows.shape[1]))))


def _kept(slots: Tensor, rows: Tensor) -> Tensor:
    """Return row numbers in which all that are not there are that of the zero row."""
    return slots.clamp(max=rows.shape[0]).long()


def _weights(like: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    """Return the weights [T, k, 1] in the compute dtype of `like`."""
    dtype = compute_dtype(like.dtype)
    if probs is None:
        return torch.ones((sorted_indices.shape[0], 1, 1), dtype=dtype, device=like.device)
    return probs.to(dtype).unsqueeze(-1)


def _rows_of(routing_map: Tensor, rows: int, drop_and_pad: bool) -> tuple[Tensor, Tensor]:
    """Return the token and the expert of each row."""
    tokens, experts = routing_map.shape
    if drop_and_pad:
        order = (~routing_map).to(torch.int8).argsort(dim=0, stable=True)
        token = order[: rows // experts].t().reshape(-1)
        expert = torch.arange(experts, device=token.device)
        return token, expert.unsqueeze(1).expand(-1, rows // experts).reshape(-1)
    check_map_rows(routing_map, rows)
    places = (~routing_map.t().reshape(-1)).to(torch.int8).argsort(stable=True)[:rows]
    return places % max(tokens, 1), places // max(tokens, 1)


BACKEND = Backend(
    "reference",
    100,
    {
        "moe_permute": Kernel(permute, permute_backward),
        "moe_unpermute": Kernel(unpermute, unpermute_backward),
        "moe_permute_map": Kernel(permute_map, permute_map_backward),
        "moe_unpermute_map": Kernel(unpermute_map, unpermute_map_backward),
    },
)
