"""Permutation of tokens by expert indices with torch_npu's kernels.

Weights of another dtype than the tokens are met in fp32. The map form is left to torch's own
operators: the documents leave open what its kernels do when tokens go to unequal numbers of
experts.
"""

from __future__ import annotations

from torch import Tensor

from .. import npu
from ..registry import Backend, Kernel
from . import portable


def permute(tokens: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return (permuted, sorted_indices); the number of rows is always given."""
    if rows == 0 or 0 in (tokens.numel(), indices.numel()):
        return portable.permute(tokens, indices, rows)
    permuted, sorted_indices = npu.op("npu_moe_token_permute")(
        tokens.contiguous(), indices.contiguous(), rows, False
    )
    return permuted, sorted_indices


def permute_backward(dpermuted: Tensor, sorted_indices: Tensor, tokens: int, k: int) -> Tensor:
    """Return the gradient of the tokens."""
    if 0 in (dpermuted.numel(), sorted_indices.numel()):
        return portable.permute_backward(dpermuted, sorted_indices, tokens, k)
    dtokens: Tensor = npu.op("npu_moe_token_permute_grad_v2")(
        dpermuted.contiguous(), sorted_indices, tokens, dpermuted.dtype, k, False
    )
    return dtokens


def unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    """Return the weighted sum of each token's rows."""
    if 0 in (permuted.numel(), sorted_indices.numel()):
        return portable.unpermute(permuted, sorted_indices, probs)
    rows, weights = _alike(permuted, probs)
    out: Tensor = npu.op("npu_moe_token_unpermute")(rows, sorted_indices.int(), weights, False)
    return out.to(permuted.dtype)


def unpermute_backward(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    if 0 in (dout.numel(), sorted_indices.numel(), rows):
        return portable.unpermute_backward(dout, permuted, sorted_indices, probs, rows)
    # Only the gradient of probs reads the rows: without it anything of their shape will do.
    values = dout.new_empty((rows, dout.shape[1])) if permuted is None else permuted
    wide, weights = _alike(values, probs)
    dpermuted, dprobs = npu.op("npu_moe_token_unpermute_grad")(
        wide, dout.to(wide.dtype).contiguous(), sorted_indices.int(), weights, False
    )
    if permuted is None or probs is None:
        return dpermuted.to(dout.dtype), dout.new_empty(0)
    return dpermuted.to(dout.dtype), dprobs.to(probs.dtype)


def _alike(rows: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return rows and weights in one dtype: their own, or fp32."""
    if probs is None or probs.dtype == rows.dtype:
        return rows.contiguous(), None if probs is None else probs.contiguous()
    return rows.float().contiguous(), probs.float().contiguous()


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {
        "moe_permute": Kernel(permute, permute_backward, npu.declines),
        "moe_unpermute": Kernel(unpermute, unpermute_backward, npu.declines),
    },
    npu.available,
)
