"""The merge of two attention results in Triton: each output is read once, each is written once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ... import triton
from . import portable

if TYPE_CHECKING:
    import triton.language as tl

# Which dimensions of the rows [n0, n1, n2] the log-sum-exp [B, H, S] has, first to last.
ORDERS = {"bshd": (0, 2, 1), "sbhd": (1, 2, 0), "bhsd": (0, 1, 2)}


@triton.jit
def _forward(
    out1: tl.tensor,
    lse1: tl.tensor,
    out2: tl.tensor,
    lse2: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    size1: tl.tensor,
    size2: tl.tensor,
    step0: tl.tensor,
    step1: tl.tensor,
    step2: tl.tensor,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_row = row // (size1 * size2) * step0 + row // size2 % size1 * step1 + row % size2 * step2
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row[:, None] * width + column
    wide = tl.float64 if DOUBLE else tl.float32
    none = float("-inf")
    first = tl.load(lse1 + of_row, row < rows, none)
    second = tl.load(lse2 + of_row, row < rows, none)
    top = tl.maximum(first, second)
    # Without any key in either part the difference of infinities is no number.
    base = tl.where(top == none, 0.0, top)
    weight1, weight2 = tl.exp(first - base), tl.exp(second - base)
    total = tl.where(top == none, 1.0, weight1 + weight2)
    tl.store(lse + of_row, tl.where(top == none, none, base + tl.log(total)), row < rows)
    part1 = tl.load(out1 + place, inside, 0.0).to(wide) * (weight1 / total)[:, None]
    part2 = tl.load(out2 + place, inside, 0.0).to(wide) * (weight2 / total)[:, None]
    tl.store(out + place, (part1 + part2).to(out.dtype.element_ty), inside)


@triton.jit
def _backward(
    dout: tl.tensor,
    dlse: tl.tensor,
    out1: tl.tensor,
    lse1: tl.tensor,
    out2: tl.tensor,
    lse2: tl.tensor,
    lse: tl.tensor,
    dout1: tl.tensor,
    dlse1: tl.tensor,
    dout2: tl.tensor,
    dlse2: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    size1: tl.tensor,
    size2: tl.tensor,
    step0: tl.tensor,
    step1: tl.tensor,
    step2: tl.tensor,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_row = row // (size1 * size2) * step0 + row // size2 % size1 * step1 + row % size2 * step2
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row[:, None] * width + column
    wide = tl.float64 if DOUBLE else tl.float32
    none = float("-inf")
    whole = tl.load(lse + of_row, row < rows, none)
    base = tl.where(whole == none, 0.0, whole)
    weight1 = tl.exp(tl.load(lse1 + of_row, row < rows, none) - base)
    weight2 = tl.exp(tl.load(lse2 + of_row, row < rows, none) - base)
    grad = tl.load(dout + place, inside, 0.0).to(wide)
    part1 = tl.load(out1 + place, inside, 0.0).to(wide)
    part2 = tl.load(out2 + place, inside, 0.0).to(wide)
    # The rounded output would cost a cancelling difference its digits: it is formed again.
    joined = part1 * weight1[:, None] + part2 * weight2[:, None]
    grad_lse = tl.load(dlse + of_row, row < rows, 0.0)
    slope1 = weight1 * (tl.sum(grad * (part1 - joined), 1) + grad_lse)
    slope2 = weight2 * (tl.sum(grad * (part2 - joined), 1) + grad_lse)
    tl.store(dlse1 + of_row, slope1, row < rows)
    tl.store(dlse2 + of_row, slope2, row < rows)
    tl.store(dout1 + place, (grad * weight1[:, None]).to(dout1.dtype.element_ty), inside)
    tl.store(dout2 + place, (grad * weight2[:, None]).to(dout2.dtype.element_ty), inside)


def forward(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse)."""
    tensors = [t.contiguous() for t in (out1, lse1, out2, lse2)]
    results = (out1.new_empty(out1.shape), lse1.new_empty(lse1.shape))
    _launch(_forward, out1, layout, *tensors, *results)
    return results


def backward(
    dout: Tensor,
    dlse: Tensor,
    out1: Tensor,
    lse1: Tensor,
    out2: Tensor,
    lse2: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dout1, dlse1, dout2, dlse2)."""
    tensors = [t.contiguous() for t in (dout, dlse, out1, lse1, out2, lse2, lse)]
    grads = [t.new_empty(t.shape) for t in (out1, lse1, out2, lse2)]
    _launch(_backward, out1, layout, *tensors, *grads)
    return grads[0], grads[1], grads[2], grads[3]


def _launch(kernel: triton.Jit, out: Tensor, layout: str, *tensors: Tensor) -> None:
    width = out.shape[-1]
    sizes, steps = _steps(out, layout)
    rows = sizes[0] * sizes[1] * sizes[2]
    tile = triton.tile(width, rows)
    kernel.launch(
        (triton.blocks(rows, tile[0]),),
        *(*tensors, rows, width, sizes[1], sizes[2], *steps),
        DOUBLE=triton.wide(out.dtype),
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=4,
    )


def _steps(out: Tensor, layout: str) -> tuple[list[Any], list[Any]]:
    """Return the sizes of the rows' dimensions and their steps in a contiguous log-sum-exp."""
    sizes = list(out.shape[:-1])
    sizes = [1] * (3 - len(sizes)) + sizes
    steps, step = [0, 0, 0], 1
    for dim in reversed(ORDERS.get(layout, (0, 1, 2))):
        steps[dim] = step
        step = step * sizes[dim]
    return sizes, steps


BACKEND = triton.backend({"attention_merge": (forward, backward)}, portable.BACKEND)
