"""torch_npu's permutation of tokens as documented: stable order, int32 rows, sums in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .require import need, need_contiguous, need_dtypes


def permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (permuted, sorted_indices [T * k] int32, not cut)."""
    op = "npu_moe_token_permute"
    _check(op, padded_mode, tokens)
    need(op, indices.shape[0] == tokens.shape[0], "indices for each token")
    slots = indices.numel()
    asked = num_out_tokens or 0
    rows = min(asked, slots) if asked > 0 else slots + asked
    k = slots // tokens.shape[0]
    order = indices.reshape(-1).argsort(stable=True)
    return tokens[order[:rows] // k], order.argsort().int()


def permute_grad(
    grad: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topk: int,
    padded_mode: bool = False,
) -> Tensor:
    """Return the gradient of the tokens."""
    op = "npu_moe_token_permute_grad_v2"
    _check(op, padded_mode, grad)
    need(op, sorted_indices.dtype is torch.int32, "int32 rows")
    need(op, sorted_indices.numel() == tokens_size_0 * num_topk, "a row for each choice")
    wide = _with_zero_row(grad)[_kept(sorted_indices, grad)]
    return wide.view(tokens_size_0, num_topk, -1).sum(1).to(tokens_dtype)


def unpermute(
    permuted: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Return the weighted sum of each token's rows."""
    op = "npu_moe_token_unpermute"
    _check(op, padded_mode, permuted, probs)
    need(op, sorted_indices.dtype is torch.int32, "int32 rows")
    weights = _weights(sorted_indices, probs)
    wide = _with_zero_row(permuted)[_kept(sorted_indices, permuted)]
    return (wide.view(*weights.shape[:2], -1) * weights).sum(1).to(permuted.dtype)


def unpermute_grad(
    permuted: Tensor,
    grad: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and probs."""
    op = "npu_moe_token_unpermute_grad"
    _check(op, padded_mode, permuted, probs)
    need(op, grad.dtype == permuted.dtype, "a gradient of permuted's dtype")
    need(op, sorted_indices.dtype is torch.int32, "int32 rows")
    weights = _weights(sorted_indices, probs)
    rows = _kept(sorted_indices, permuted).view(weights.shape[:2])
    wide = grad.float().unsqueeze(1)
    dpermuted = _with_zero_row(torch.zeros_like(permuted)).index_put((rows,), wide * weights)[:-1]
    if probs is None:
        return dpermuted.to(permuted.dtype), grad.new_empty(0)
    dprobs = (_with_zero_row(permuted)[rows] * wide).sum(-1)
    return dpermuted.to(permuted.dtype), dprobs.to(probs.dtype)


def _check(op: str, padded_mode: bool, rows: Tensor, probs: Tensor | None = None) -> None:
    need(op, not padded_mode, "padded_mode off")
    need_dtypes(op, rows, probs)
    need_contiguous(op, rows)
    need(op, rows.dim() == 2 and rows.numel() > 0, "a matrix that is not empty")


def _weights(sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    if probs is None:
        return torch.ones((sorted_indices.numel(), 1, 1), device=sorted_indices.device)
    return probs.float().unsqueeze(-1)


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat((rows.float(), rows.new_zeros((1, rows.shape[1]), dtype=torch.float32)))


def _kept(sorted_indices: Tensor, rows: Tensor) -> Tensor:
    return sorted_indices.clamp(max=rows.shape[0]).long()


KERNELS = {
    "npu::npu_moe_token_permute": permute,
    "npu::npu_moe_token_permute_grad_v2": permute_grad,
    "npu::npu_moe_token_unpermute": unpermute,
    "npu::npu_moe_token_unpermute_grad": unpermute_grad,
}
