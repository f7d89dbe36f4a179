"""Permutation of tokens by expert indices with torch_npu's kernels.

Weights of another dtype than the tokens are met in fp32. The kernels of the map form divide the
rows by the tokens, so that every token has to go to the same number of experts, which nobody can
see without reading the map: they serve where the caller says so. In which order a capacity is
filled is left open by their documents, and matters to us: that form is torch's own operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..registry import Backend, Facts, Kernel
from . import portable
from .plan import check_map_rows


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


def permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    rows: int,
    drop_and_pad: bool,
    uniform: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (permuted, permuted_probs, sorted_indices)."""
    if 0 in (rows, tokens.numel()):
        return portable.permute_map(tokens, routing_map, probs, rows, drop_and_pad)
    check_map_rows(routing_map, rows)
    weights = None if probs is None else probs.contiguous()
    permuted, permuted_probs, order = npu.op("npu_moe_token_permute_with_routing_map")(
        tokens.contiguous(), routing_map.contiguous(),
        probs=weights, num_out_tokens=rows, drop_and_pad=False,
    )  # fmt: skip
    return permuted, tokens.new_empty(0) if probs is None else permuted_probs, order


def permute_map_backward(
    dpermuted: Tensor,
    dpermuted_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    drop_and_pad: bool,
    uniform: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens and of probs (empty without probs)."""
    if 0 in dpermuted.shape:
        args = (dpermuted, dpermuted_probs, sorted_indices, routing_map, drop_and_pad)
        return portable.permute_map_backward(*args)
    tokens, experts = routing_map.shape
    dprobs_in = None if dpermuted_probs is None else dpermuted_probs.contiguous()
    dtokens, dprobs = npu.op("npu_moe_token_permute_with_routing_map_grad")(
        dpermuted.contiguous(), dprobs_in, sorted_indices, routing_map.contiguous(),
        experts, tokens, False,
    )  # fmt: skip
    return dtokens, dpermuted.new_empty(0) if dpermuted_probs is None else dprobs


def unpermute_map(
    permuted: Tensor,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    uniform: bool,
) -> Tensor:
    """Return the weighted sum of each token's rows."""
    if 0 in permuted.shape:
        return portable.unpermute_map(permuted, sorted_indices, routing_map, probs, drop_and_pad)
    rows, weights = _alike(permuted, probs)
    shape = [routing_map.shape[0], permuted.shape[1]]
    out: Tensor = npu.op("_npu_moe_token_unpermute_with_routing_map")(
        rows, sorted_indices.int(), shape,
        probs=weights, routing_map=routing_map.contiguous(), drop_and_pad=False,
    )[0]  # fmt: skip
    return out.to(permuted.dtype)


def unpermute_map_backward(
    dout: Tensor,
    permuted: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    drop_and_pad: bool,
    uniform: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    count, width = sorted_indices.shape[0], dout.shape[1]
    if 0 in (count, width):
        args = (dout, permuted, sorted_indices, routing_map, probs, drop_and_pad)
        return portable.unpermute_map_backward(*args)
    # Only the gradient of probs reads the rows: without it anything of their shape will do.
    values = dout.new_empty((count, width)) if permuted is None else permuted
    wide, weights = _alike(values, probs)
    token = torch.arange(count, dtype=torch.int32, device=dout.device) // (count // dout.shape[0])
    dpermuted, dprobs = npu.op("npu_moe_token_unpermute_with_routing_map_grad")(
        dout.to(wide.dtype).contiguous(), sorted_indices.int(), token, routing_map.contiguous(),
        None if probs is None else wide, weights, False, list(dout.shape),
    )  # fmt: skip
    if permuted is None or probs is None:
        return dpermuted.to(dout.dtype), dout.new_empty(0)
    return dpermuted.to(dout.dtype), dprobs.to(probs.dtype)


def _supports_map(facts: Facts) -> str | None:
    if not facts.option("uniform"):
        if facts.option("drop_and_pad"):
            return "in which order its kernels fill a capacity is not documented"
        return "its kernels need every token to go to as many experts (uniform=True says so)"
    return npu.declines(facts)


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
        "moe_permute_map": Kernel(permute_map, permute_map_backward, _supports_map),
        "moe_unpermute_map": Kernel(unpermute_map, unpermute_map_backward, _supports_map),
    },
    npu.available,
)
