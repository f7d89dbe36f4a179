"""Permutation of tokens by expert in Triton: what moves rows, each row once.

`_spread` takes tokens to rows: permute, and the backward of unpermute. `_combine` sums the rows of
each token in one order: unpermute, and the backward of permute. Sorting is left to torch.

A slot is one choice of a token. In the index form slot j belongs to token j // k, in the map form
the slots of a token follow each other from `starts` on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import triton
from ..device import compute_dtype
from . import portable
from .index_form import topk
from .plan import inverse, order_by_token, places_in_order, rows_of, starts_of, tokens_in_order

if TYPE_CHECKING:
    import triton.language as tl

# Columns of a tile.
COLUMNS = 1024


@triton.jit
def _combine(
    source: tl.tensor,
    index: tl.tensor,
    starts: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    k: tl.tensor,
    BAGS: tl.constexpr,
    PLACED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = token < tokens
    wide = tl.float64 if DOUBLE else tl.float32
    if BAGS:
        begin = tl.load(starts + token, here, 0)
        end = tl.load(starts + token + 1, token + 1 < tokens, slots)
        size = tl.where(here, end - begin, 0)
        most = tl.max(size, 0)
    else:
        begin, size = token * k, tl.where(here, k, 0)
        most = k
    total = tl.zeros((ROWS, COLUMNS), wide)
    for i in range(most):
        slot = begin + i
        row = tl.load(index + slot, i < size, 0).to(tl.int64)
        there = (i < size) & (row < count)
        value = tl.load(
            source + row[:, None] * stride + column, there[:, None] & (column < width), 0.0
        ).to(wide)
        if WEIGHTED:
            place = tl.load(places + slot, i < size, 0) if PLACED else slot
            value = value * tl.load(weights + place, there, 0.0).to(wide)[:, None]
        total += value
    target = out + token[:, None] * width + column
    tl.store(target, total.to(out.dtype.element_ty), here[:, None] & (column < width))


@triton.jit
def _spread(
    source: tl.tensor,
    index: tl.tensor,
    owners: tl.tensor,
    places: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    dots: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    rows_stride: tl.tensor,
    k: tl.tensor,
    OWNED: tl.constexpr,
    PLACED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOTS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + slot, slot < slots, 0).to(tl.int64)
    there = (slot < slots) & (row < count)
    token = tl.load(owners + slot, there, 0).to(tl.int64) if OWNED else slot // k
    place = tl.load(places + slot, slot < slots, 0).to(tl.int64) if PLACED else slot
    wide = tl.float64 if DOUBLE else tl.float32
    if WEIGHTED:
        weight = tl.load(weights + place, there, 0.0).to(wide)[:, None]
    dot = tl.zeros((ROWS,), wide)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = there[:, None] & (column < width)
        value = tl.load(source + token[:, None] * stride + column, inside, 0.0)
        if DOTS:
            other = tl.load(rows + row[:, None] * rows_stride + column, inside, 0.0)
            dot += tl.sum(value.to(wide) * other.to(wide), 1)
        if WEIGHTED:
            value = (value.to(wide) * weight).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * width + column, value, inside)
    if DOTS:
        tl.store(dots + place, dot.to(dots.dtype.element_ty), slot < slots)


def permute(tokens: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return (permuted, sorted_indices)."""
    sorted_indices = inverse(indices.reshape(-1).argsort(stable=True)).to(torch.int32)
    if 0 in (rows, sorted_indices.shape[0]):
        return portable.permute(tokens, indices, rows)
    return _spread_rows(tokens, sorted_indices, rows, topk(indices))[0], sorted_indices


def permute_backward(dpermuted: Tensor, sorted_indices: Tensor, tokens: int, k: int) -> Tensor:
    """Return the gradient of the tokens: the sum of those of their rows."""
    return _combine_rows(dpermuted, sorted_indices, tokens, k)


def unpermute(permuted: Tensor, sorted_indices: Tensor, probs: Tensor | None) -> Tensor:
    """Return the weighted sum of each token's rows."""
    tokens, k = (sorted_indices.shape[0], 1) if probs is None else probs.shape
    return _combine_rows(permuted, sorted_indices, tokens, k, weights=probs)


def unpermute_backward(
    dout: Tensor, permuted: Tensor | None, sorted_indices: Tensor, probs: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of permuted and of probs (empty when permuted is None)."""
    if not rows:
        return portable.unpermute_backward(dout, permuted, sorted_indices, probs, rows)
    k = 1 if probs is None else probs.shape[1]
    return _spread_rows(dout, sorted_indices, rows, k, weights=probs, values=permuted)


def permute_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    rows: int,
    drop_and_pad: bool,
    *_: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (permuted, permuted_probs, sorted_indices)."""
    if not rows:
        return portable.permute_map(tokens, routing_map, probs, rows, drop_and_pad)
    token, expert = rows_of(routing_map, rows, drop_and_pad)
    permuted_probs = tokens.new_empty(0) if probs is None else probs[token, expert]
    order = order_by_token(token, routing_map.shape[0]).to(torch.int32)
    # Tokens by token, so that each is read while it is still in the cache.
    owners = token.index_select(0, order)
    permuted = _spread_rows(tokens, order, rows, 1, owners=owners)[0]
    return permuted, permuted_probs, order


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
    tokens = routing_map.shape[0]
    dtokens = _combine_rows(dpermuted, sorted_indices, tokens, 1, starts=starts_of(*where))
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
    return _combine_rows(
        permuted,
        sorted_indices,
        routing_map.shape[0],
        1,
        starts=starts_of(*where),
        places=None if probs is None else places_in_order(*where),
        weights=probs,
    )


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
    return _spread_rows(
        dout,
        sorted_indices,
        sorted_indices.shape[0],
        1,
        owners=tokens_in_order(*where),
        places=None if probs is None else places_in_order(*where),
        weights=probs,
        values=permuted,
    )


def _combine_rows(
    source: Tensor,
    index: Tensor,
    tokens: tl.tensor,
    k: tl.tensor,
    *,
    starts: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    width = source.shape[1]
    source = triton.rows_of(source, width)
    out = source.new_empty((tokens, width))
    rows, columns = _tile(width, tokens)
    _combine.launch(
        (triton.blocks(tokens, rows), triton.blocks(width, columns)),
        *(source, index.contiguous(), *triton.pointers(index, starts, places)),
        *triton.pointers(source, weights),
        *(out, tokens, index.shape[0], source.shape[0], width, source.stride(0), k),
        BAGS=starts is not None,
        PLACED=places is not None,
        WEIGHTED=weights is not None,
        DOUBLE=triton.wide(source.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


def _spread_rows(
    source: Tensor,
    index: Tensor,
    count: tl.tensor,
    k: tl.tensor,
    *,
    owners: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    width = source.shape[1]
    source = triton.rows_of(source, width)
    out, dots = source.new_empty((count, width)), source.new_empty(0)
    if weights is not None and values is not None:
        # What no slot names keeps a gradient of zero; the sum of products is rounded once.
        dots = weights.new_zeros(weights.shape)
    wanted = dots.numel() > 0
    other = triton.rows_of(values, width) if wanted and values is not None else source
    rows, columns = _tile(width, index.shape[0])
    _spread.launch(
        (triton.blocks(index.shape[0], rows),),
        *(source, index.contiguous(), *triton.pointers(index, owners, places)),
        *triton.pointers(source, weights),
        *(other, out, dots if wanted else out, index.shape[0], count, width),
        *(source.stride(0), other.stride(0), k),
        OWNED=owners is not None,
        PLACED=places is not None,
        WEIGHTED=weights is not None,
        DOTS=wanted,
        DOUBLE=triton.wide(compute_dtype(source.dtype)),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return out, dots


def _tile(width: Any, rows: Any) -> tuple[int, int]:
    columns = min(COLUMNS, triton.power_of_two(width))
    return triton.tile(columns, rows)[0], columns


BACKEND = triton.backend(
    {
        "moe_permute": (permute, permute_backward),
        "moe_unpermute": (unpermute, unpermute_backward),
        "moe_permute_map": (permute_map, permute_map_backward),
        "moe_unpermute_map": (unpermute_map, unpermute_map_backward),
    },
    portable.BACKEND,
)
