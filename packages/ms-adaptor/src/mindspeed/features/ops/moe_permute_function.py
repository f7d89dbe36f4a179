"""Megatron's functions of the token dispatchers on ms_ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ms_ops


def wrap_permute(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serve `fused=True`; everything else stays Megatron's."""

    @functools.wraps(original)
    def permute(
        tokens: Tensor,
        routing_map: Tensor,
        probs: Tensor | None = None,
        num_out_tokens: int | Tensor | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if not fused:
            result: tuple[Tensor, Tensor | None, Tensor]
            result = original(tokens, routing_map, probs, num_out_tokens, False, drop_and_pad)
            return result
        padded = drop_and_pad and num_out_tokens is not None
        # On the host counting is free, and Megatron's number may be an upper bound there.
        known = num_out_tokens is not None and (padded or routing_map.device.type != "cpu")
        rows = int(num_out_tokens) if known else None  # type: ignore[arg-type]
        return ms_ops.moe_permute_map(tokens, routing_map.bool(), probs, rows, drop_and_pad=padded)

    return permute


def wrap_unpermute(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serve `fused=True`; everything else stays Megatron's."""

    @functools.wraps(original)
    def unpermute(
        permuted_tokens: Tensor,
        sorted_indices: Tensor,
        restore_shape: Sequence[int],
        probs: Tensor | None = None,
        routing_map: Tensor | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
    ) -> Tensor:
        if not fused:
            out: Tensor = original(
                permuted_tokens,
                sorted_indices,
                restore_shape,
                probs,
                routing_map,
                False,
                drop_and_pad,
            )
            return out
        if routing_map is None:
            raise ValueError("unpermute: routing_map: got None, need the map of the permutation")
        return ms_ops.moe_unpermute_map(
            permuted_tokens, sorted_indices, routing_map.bool(), probs, drop_and_pad=drop_and_pad
        )

    return unpermute


def wrap_sort_chunks_by_idxs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serve `fused=True` without reading sizes from a device."""

    @functools.wraps(original)
    def sort_chunks_by_idxs(
        input: Tensor,
        split_sizes: Tensor,
        sorted_idxs: Tensor,
        probs: Tensor | None = None,
        fused: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not fused or split_sizes.device.type == "cpu":
            result: tuple[Tensor, Tensor | None]
            result = original(input, split_sizes, sorted_idxs, probs, False)
            return result
        rows = chunk_rows(split_sizes, sorted_idxs, input.shape[0])
        return input.index_select(0, rows), None if probs is None else probs[rows]

    return sort_chunks_by_idxs


def chunk_rows(split_sizes: Tensor, sorted_idxs: Tensor, rows: int) -> Tensor:
    """Return the row that comes to each place when chunks are put in another order.

    Args:
        split_sizes: [chunks], rows of each chunk.
        sorted_idxs: [chunks], the chunk that comes to each place.
        rows: of all chunks together, so that no size has to be read.
    """
    sorted_idxs = sorted_idxs.to(split_sizes.device)
    sizes = split_sizes[sorted_idxs]
    shift = (split_sizes.cumsum(0) - split_sizes)[sorted_idxs] - (sizes.cumsum(0) - sizes)
    places = torch.arange(rows, device=split_sizes.device)
    return places + shift.repeat_interleave(sizes, output_size=rows)
