"""Gather and weighted sum of rows, the two passes over memory that permutations are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import LOW_PRECISION, compute_dtype, upcast

# Elements of a block whose temporaries stay in the processor's cache: 1 MiB in fp32.
BLOCK = 1 << 18


def combine(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sums of bags of rows, rounded once.

    Args:
        rows: [n, H].
        index: [m], the rows of all bags, one bag after another.
        starts: [T], where in `index` each bag starts; bags may be empty.
        weights: [m], of any floating dtype.
    """
    if not (index.shape[0] and rows.numel()):
        return rows.new_zeros((starts.shape[0], rows.shape[1]))
    if type(rows) is not Tensor or rows.device.type not in ("cpu", "cuda"):
        return _add_up(rows, index, starts, weights)
    if weights is not None and rows.dtype in LOW_PRECISION and weights.dtype != rows.dtype:
        index, starts, weights = _split_weights(rows.dtype, index, starts, weights)
    if weights is not None:
        weights = weights.to(rows.dtype)
    # torch's kernel sums in fp32 and needs no copy of the gathered rows.
    return F.embedding_bag(index, rows.contiguous(), starts, mode="sum", per_sample_weights=weights)


def spread(
    dout: Tensor, token: Tensor, weight: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted row of its token for each row, and its product with `rows`.

    Args:
        dout: [T, H].
        token: [n], the token of each row.
        weight: [n], None for 1.
        rows: [n, H], None when the products are not wanted.

    Returns:
        ([n, H] in dout's dtype, [n] in its compute dtype or None).
    """
    if weight is None:
        return dout.index_select(0, token), None
    weight = weight.to(compute_dtype(dout.dtype)).unsqueeze(1)
    out = dout.new_empty((token.shape[0], dout.shape[1]))
    dots = None if rows is None else weight.new_empty(token.shape[0])
    for part in _blocks(out):
        # Gathered once for both results, and small enough to be read twice for nothing.
        grads = upcast(dout.index_select(0, token[part]))
        if rows is not None and dots is not None:
            dots[part] = (grads * rows[part]).sum(1)
        out[part] = grads.mul_(weight[part])
    return out, dots


def _blocks(rows: Tensor) -> Iterator[slice]:
    count, width = rows.shape
    if type(rows) is not Tensor or rows.device.type != "cpu" or count * width <= BLOCK:
        yield slice(None)
        return
    step = max(1, BLOCK // width)
    for start in range(0, count, step):
        yield slice(start, start + step)


def _split_weights(
    dtype: torch.dtype, index: Tensor, starts: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write each weight as a sum of low-precision ones: its rounding, what that left over, ...

    torch's kernel wants weights in the dtype of the rows. Each row is taken two times (fp16: 11
    bits each) or three times (bf16: 8 bits each), which costs less than rows of full precision.
    """
    times = 2 if dtype is torch.float16 else 3
    rest, terms = weights.float(), []
    for _ in range(times):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].float()
    return index.repeat_interleave(times), starts * times, torch.stack(terms, 1).view(-1)


def _add_up(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Do what `combine` does with operations that every device and every trace has."""
    places = torch.arange(index.shape[0], device=index.device)
    bag = torch.searchsorted(starts, places.to(starts.dtype), right=True) - 1
    wide = upcast(rows.index_select(0, index))
    if weights is not None:
        wide = wide * weights.to(wide.dtype).unsqueeze(1)
    out = wide.new_zeros((starts.shape[0], rows.shape[1]))
    return out.index_add(0, bag, wide).to(rows.dtype)
