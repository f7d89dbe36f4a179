"""SwiGLU in Triton: one pass over x in forward, one over x and dy in backward.

Along any dimension the halves of contiguous x are runs of neighbours, so that one kernel serves all
dimensions. With a bias a fixed number of programs walk over the rows and add its gradient up in
registers; with weights a program walks over the columns of its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import triton
from ..device import compute_dtype
from . import portable

if TYPE_CHECKING:
    import triton.language as tl

# Columns of a tile, and rows that are added in one step.
COLUMNS = 1024
ROWS = 16
# Programs that share the rows when they are summed.
PROGRAMS = 256


@triton.jit
def _forward(
    x: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    half: tl.tensor,
    x_stride: tl.tensor,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < half)
    wide = tl.float64 if DOUBLE else tl.float32
    place = x + row * x_stride + column
    gate = tl.load(place, inside, 0.0).to(wide)
    up = tl.load(place + half, inside, 0.0).to(wide)
    if BIAS:
        gate += tl.load(bias + column, column < half, 0.0).to(wide)
        up += tl.load(bias + half + column, column < half, 0.0).to(wide)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        out = out * tl.load(weights + row, row < rows, 0.0).to(wide)
    tl.store(y + row * half + column, out.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    dx: tl.tensor,
    dbias: tl.tensor,
    rows: tl.tensor,
    half: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    BIAS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    wide = tl.float64 if DOUBLE else tl.float32
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column = columns[None, :]
    gate_total, up_total = tl.zeros((COLUMNS,), wide), tl.zeros((COLUMNS,), wide)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < half)
        place = x + row * x_stride + column
        gate = tl.load(place, inside, 0.0).to(wide)
        up = tl.load(place + half, inside, 0.0).to(wide)
        if BIAS:
            gate += tl.load(bias + column, column < half, 0.0).to(wide)
            up += tl.load(bias + half + column, column < half, 0.0).to(wide)
        grad = tl.load(dy + row * dy_stride + column, inside, 0.0).to(wide)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        dgate, dup = grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad * silu
        place = dx + row * 2 * half + column
        tl.store(place, dgate.to(dx.dtype.element_ty), inside)
        tl.store(place + half, dup.to(dx.dtype.element_ty), inside)
        if BIAS:
            gate_total += tl.sum(dgate, 0)
            up_total += tl.sum(dup, 0)
    if BIAS:
        total = dbias + tl.program_id(0) * 2 * half + columns
        tl.store(total, gate_total, columns < half)
        tl.store(total + half, up_total, columns < half)


@triton.jit
def _weighted_backward(
    dy: tl.tensor,
    x: tl.tensor,
    weights: tl.tensor,
    dx: tl.tensor,
    dweights: tl.tensor,
    rows: tl.tensor,
    half: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    wide = tl.float64 if DOUBLE else tl.float32
    of_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = of_row[:, None]
    weight = tl.load(weights + of_row, of_row < rows, 0.0).to(wide)[:, None]
    dot = tl.zeros((ROWS,), wide)
    for start in range(0, half, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (row < rows) & (column < half)
        place = x + row * x_stride + column
        gate = tl.load(place, inside, 0.0).to(wide)
        up = tl.load(place + half, inside, 0.0).to(wide)
        grad = tl.load(dy + row * dy_stride + column, inside, 0.0).to(wide)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        dot += tl.sum(grad * silu * up, 1)
        grad = grad * weight
        dgate, dup = grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad * silu
        place = dx + row * 2 * half + column
        tl.store(place, dgate.to(dx.dtype.element_ty), inside)
        tl.store(place + half, dup.to(dx.dtype.element_ty), inside)
    tl.store(dweights + of_row, dot.to(dweights.dtype.element_ty), of_row < rows)


def forward(x: Tensor, dim: int) -> Tensor:
    """Return silu(a) * b."""
    return _launch_forward(x, dim, None, None)


def backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return dx from x alone."""
    return _launch_backward(dy, x, dim, None)[0]


def bias_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Return SwiGLU of x + bias."""
    return _launch_forward(x, -1, bias, None)


def bias_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dbias); dbias sums what dx is before it is rounded."""
    dx, parts = _launch_backward(dy, x, -1, bias)
    return dx, parts.sum(0).to(bias.dtype)


def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of x times weights [..., 1]."""
    return _launch_forward(x, -1, None, weights)


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dweights)."""
    dx, dweights = x.new_empty(x.shape), weights.new_empty(weights.shape)
    flat, half = triton.rows_of(x, x.shape[-1]), x.shape[-1] // 2
    grad = triton.rows_of(dy, half)
    rows, columns = _tile(half, flat.shape[0])
    _weighted_backward.launch(
        (triton.blocks(flat.shape[0], rows),),
        *(grad, flat, weights.contiguous(), dx, dweights),
        *(flat.shape[0], half, grad.stride(0), flat.stride(0)),
        DOUBLE=triton.wide(x.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return dx, dweights


def _launch_forward(x: Tensor, dim: int, bias: Tensor | None, weights: Tensor | None) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // 2
    y = x.new_empty(shape)
    flat, half = triton.rows_of(x, _run(x, dim)), _run(x, dim) // 2
    rows, columns = _tile(half, flat.shape[0])
    _forward.launch(
        (triton.blocks(flat.shape[0], rows), triton.blocks(half, columns)),
        *(flat, *triton.pointers(flat, bias, weights), y, flat.shape[0], half, flat.stride(0)),
        BIAS=bias is not None,
        WEIGHTED=weights is not None,
        DOUBLE=triton.wide(x.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return y


def _launch_backward(dy: Tensor, x: Tensor, dim: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dx, and parts of dbias."""
    dx, parts = x.new_empty(x.shape), x.new_empty(0)
    run = _run(x, dim)
    flat, grad, half = triton.rows_of(x, run), triton.rows_of(dy, run // 2), run // 2
    rows, columns = _tile(half, flat.shape[0])
    programs = triton.blocks(flat.shape[0], rows)
    if bias is not None:
        rows = min(rows, ROWS)
        programs = triton.share(triton.blocks(flat.shape[0], rows), PROGRAMS)
        parts = x.new_empty((programs, run), dtype=compute_dtype(x.dtype))
    _backward.launch(
        (programs, triton.blocks(half, columns)),
        *(grad, flat, *triton.pointers(flat, bias), dx, dx if bias is None else parts),
        *(flat.shape[0], half, grad.stride(0), flat.stride(0)),
        BIAS=bias is not None,
        DOUBLE=triton.wide(x.dtype),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return dx, parts


def _run(x: Tensor, dim: int) -> Any:
    """Return how many neighbours both halves are, from one row to the next."""
    size: Any = 1
    for n in x.shape[dim % x.dim() :]:
        size = size * n
    return size


def _tile(half: Any, rows: Any) -> tuple[int, int]:
    columns = min(COLUMNS, triton.power_of_two(half))
    return triton.tile(columns, rows)


BACKEND = triton.backend(
    {
        "swiglu": (forward, backward),
        "bias_swiglu": (bias_forward, bias_backward),
        "weighted_swiglu": (weighted_forward, weighted_backward),
    },
    portable.BACKEND,
)
