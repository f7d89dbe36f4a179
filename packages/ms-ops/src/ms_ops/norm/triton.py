"""RMSNorm in Triton: a program takes whole rows, each row is read once a direction.

In backward a fixed number of programs walk over the rows and add dweight up in registers; torch
sums what they leave. So the order of the sum does not depend on which program runs when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import triton
from ..device import compute_dtype
from . import portable

if TYPE_CHECKING:
    import triton.language as tl

# Programs of the backward kernel: a few for each multiprocessor of a large GPU.
PROGRAMS = 512
# Rows that are added in one step: short sums of short sums lose less to rounding than long ones.
ROWS = 16


@triton.jit
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    wide = tl.float64 if DOUBLE else tl.float32
    values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, 0.0).to(wide)
    scale = tl.load(weight + column, column < width, 0.0).to(wide) + OFFSET
    mean = tl.sum(values * values, 1) / width
    root = 1.0 / tl.sqrt(mean + EPS)
    normed = values * root[:, None]
    if LLAMA:
        normed = normed.to(y.dtype.element_ty).to(wide)
    place = y + row[:, None] * width + column[None, :]
    tl.store(place, (normed * scale[None, :]).to(y.dtype.element_ty), inside)
    tl.store(rstd + row, root, row < rows)


@triton.jit
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    column = tl.arange(0, COLUMNS)
    wide = tl.float64 if DOUBLE else tl.float32
    scale = tl.load(weight + column, column < width, 0.0).to(wide) + OFFSET
    total = tl.zeros((COLUMNS,), wide)
    start = tl.program_id(0)
    for block in range(start, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * x_stride + column[None, :], inside, 0.0).to(wide)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], inside, 0.0).to(wide)
        root = tl.load(rstd + row, row < rows, 0.0)[:, None]
        normed = values * root
        scaled = grad * scale[None, :]
        mean = tl.sum(scaled * normed, 1)[:, None] / width
        place = dx + row[:, None] * width + column[None, :]
        tl.store(place, (root * (scaled - normed * mean)).to(dx.dtype.element_ty), inside)
        if LLAMA:
            normed = normed.to(x.dtype.element_ty).to(wide)
        total += tl.sum(grad * normed, 0)
    tl.store(dweight + start * width + column, total, column < width)


def forward(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd)."""
    width = weight.numel()
    if width > triton.WIDEST:
        return portable.forward(x, weight, eps, weight_offset, casting)
    flat = triton.rows_of(x, width)
    y = x.new_empty(x.shape)
    shape = [*x.shape[: x.dim() - weight.dim()], *[1] * weight.dim()]
    rstd = x.new_empty(shape, dtype=compute_dtype(x.dtype))
    rows, columns = triton.tile(width, flat.shape[0])
    _forward.launch(
        (triton.blocks(flat.shape[0], rows),),
        flat,
        weight.contiguous(),
        y,
        rstd,
        flat.shape[0],
        width,
        flat.stride(0),
        EPS=eps,
        OFFSET=weight_offset,
        LLAMA=casting == "llama",
        DOUBLE=triton.wide(x.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=triton.warps(rows * columns),
    )
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight)."""
    width = weight.numel()
    if width > triton.WIDEST:
        return portable.backward(dy, x, weight, rstd, weight_offset, casting)
    flat, grad = triton.rows_of(x, width), triton.rows_of(dy, width)
    dx = x.new_empty(x.shape)
    rows, columns = triton.tile(width, flat.shape[0])
    rows = min(rows, ROWS)
    programs = triton.share(triton.blocks(flat.shape[0], rows), PROGRAMS)
    parts = torch.empty((programs, width), dtype=rstd.dtype, device=x.device)
    _backward.launch(
        (programs,),
        grad,
        flat,
        weight.contiguous(),
        rstd.contiguous(),
        dx,
        parts,
        flat.shape[0],
        width,
        grad.stride(0),
        flat.stride(0),
        OFFSET=weight_offset,
        LLAMA=casting == "llama",
        DOUBLE=triton.wide(x.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=triton.warps(rows * columns),
    )
    return dx, parts.sum(0).to(weight.dtype).view(weight.shape)


BACKEND = triton.backend({"rms_norm": (forward, backward)}, portable.BACKEND)
