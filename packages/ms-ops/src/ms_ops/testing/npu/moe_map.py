"""torch_npu's permutation by a routing map as documented, without capacity.

Every token has to go to the same number of experts: the kernels divide the rows by the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .require import need, need_contiguous, need_dtypes


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (permuted, permuted_probs, sorted_indices int32)."""
    op = "npu_moe_token_permute_with_routing_map"
    _check(op, tokens, routing_map, drop_and_pad)
    # What the vendor takes for a call without a number, which fits one expert a token only.
    asked = tokens.shape[0] if num_out_tokens is None else num_out_tokens
    k = asked // tokens.shape[0]
    rows = k * tokens.shape[0]
    permuted = tokens.new_empty((rows, tokens.shape[1]))
    order = tokens.new_empty(rows, dtype=torch.int32)
    weights = None if probs is None else probs.new_empty(rows)
    if tokens.device.type == "cpu":
        _check_sizes(op, routing_map, k)
        token = routing_map.t().nonzero()[:, 1]
        order.copy_(token.argsort(stable=True))
        permuted[order.long()] = tokens.repeat_interleave(k, 0)
        if probs is not None and weights is not None:
            weights.copy_(probs.t().masked_select(routing_map.t()))
    return permuted, weights, order


def permute_grad(
    grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the tokens and of probs."""
    op = "npu_moe_token_permute_with_routing_map_grad"
    _check(op, grad, routing_map, drop_and_pad)
    _check_order(op, sorted_indices, grad.shape[0])
    sizes = (tokens_num, experts_num)
    need(op, tuple(routing_map.shape) == sizes, f"a map of {sizes}")
    dtokens = grad.new_empty((tokens_num, grad.shape[1]))
    dprobs = None if probs_grad is None else probs_grad.new_empty(sizes)
    if grad.device.type == "cpu":
        k = grad.shape[0] // tokens_num
        _check_sizes(op, routing_map, k)
        rows = grad.float()[sorted_indices.long()].view(tokens_num, k, -1)
        dtokens.copy_(rows.sum(1))
        if probs_grad is not None and dprobs is not None:
            dprobs.copy_(_spread(probs_grad, routing_map))
    return dtokens, dprobs


def unpermute(
    permuted: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tokens, and three results for the vendor's own backward."""
    op = "_npu_moe_token_unpermute_with_routing_map"
    need_dtypes(op, permuted, probs)
    need(op, routing_map is not None, "the map")
    assert routing_map is not None
    _check(op, permuted, routing_map, drop_and_pad)
    _check_order(op, sorted_indices, permuted.shape[0])
    need(op, list(restore_shape) == [routing_map.shape[0], permuted.shape[1]], "tokens' shape")
    out = permuted.new_empty(list(restore_shape))
    token = torch.empty_like(sorted_indices)
    weights = None if probs is None else probs.new_empty(sorted_indices.shape)
    if out.device.type == "cpu":
        k = permuted.shape[0] // out.shape[0]
        _check_sizes(op, routing_map, k)
        wide = permuted.float()
        if probs is not None and weights is not None:
            weights.copy_(probs.t().masked_select(routing_map.t()))
            wide = wide * weights.float().unsqueeze(1)
        out.copy_(wide[sorted_indices.long()].view(out.shape[0], k, -1).sum(1))
        token.copy_(torch.arange(permuted.shape[0]) // k)
    return out, sorted_indices.clone(), token, weights


def unpermute_grad(
    grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rows and of probs, both of the gradient's dtype."""
    op = "npu_moe_token_unpermute_with_routing_map_grad"
    need_dtypes(op, grad, probs)
    need(op, routing_map is not None and list(restore_shape) == list(grad.shape), "map and shape")
    assert routing_map is not None
    _check(op, grad, routing_map, drop_and_pad)
    for index in (out_index, permuted_token_id):
        _check_order(op, index, out_index.shape[0])
    dpermuted = grad.new_empty((out_index.shape[0], grad.shape[1]))
    dprobs = None if probs is None else grad.new_empty(probs.shape)
    if grad.device.type == "cpu":
        rows = torch.empty(dpermuted.shape)
        rows[out_index.long()] = grad.float()[permuted_token_id.long()]
        if probs is not None and dprobs is not None:
            need(op, permuted is not None and permuted.dtype == grad.dtype, "rows beside probs")
            assert permuted is not None
            dprobs.copy_(_spread((rows * permuted.float()).sum(1), routing_map))
            rows = rows * probs.t().masked_select(routing_map.t()).float().unsqueeze(1)
        dpermuted.copy_(rows)
    return dpermuted, dprobs


def _spread(values: Tensor, routing_map: Tensor) -> Tensor:
    """Put values in the order of the experts where the map is True, 0 elsewhere."""
    turned = values.new_zeros(routing_map.t().shape)
    return turned.masked_scatter(routing_map.t(), values).t()


def _check(op: str, rows: Tensor, routing_map: Tensor, drop_and_pad: bool) -> None:
    need(op, not drop_and_pad, "drop_and_pad off: its order is left open")
    need_dtypes(op, rows)
    need_contiguous(op, rows, routing_map)
    need(op, rows.dim() == 2 and rows.numel() > 0, "a matrix that is not empty")
    need(op, routing_map.dtype in (torch.bool, torch.int8), "a map of bool or int8")


def _check_order(op: str, index: Tensor, rows: int) -> None:
    need(op, index.dtype is torch.int32 and tuple(index.shape) == (rows,), f"{rows} int32 rows")


def _check_sizes(op: str, routing_map: Tensor, k: int) -> None:
    need(op, bool((routing_map.sum(1) == k).all()), f"{k} experts for every token")


KERNELS = {
    "npu::npu_moe_token_permute_with_routing_map": permute,
    "npu::npu_moe_token_permute_with_routing_map_grad": permute_grad,
    "npu::_npu_moe_token_unpermute_with_routing_map": unpermute,
    "npu::npu_moe_token_unpermute_with_routing_map_grad": unpermute_grad,
}
