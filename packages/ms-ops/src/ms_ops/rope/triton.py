"""Rotary embedding in Triton: one pass over x, angles read where they vary.

x keeps its strides. Its leading dimensions are three, after neighbours are merged or, where that is
not possible, cos and sin are spread over all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import triton
from . import portable

if TYPE_CHECKING:
    import triton.language as tl

LEADING = 3


@triton.jit
def _turn(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    size1: tl.tensor,
    size2: tl.tensor,
    half: tl.tensor,
    rest: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x_step: tl.tensor,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    BACKWARD: tl.constexpr,
    PAIRS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i0, i1, i2 = row // (size1 * size2), row // size2 % size1, row % size2
    source = x + (i0 * x0 + i1 * x1 + i2 * x2)[:, None]
    angle = (i0 * c0 + i1 * c1 + i2 * c2)[:, None]
    target = y + (row * (2 * half + rest))[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (column < half)
    first = 2 * column if PAIRS else column
    second = first + 1 if PAIRS else first + half
    wide = tl.float64 if DOUBLE else tl.float32
    a = tl.load(source + first * x_step, inside, 0.0).to(wide)
    b = tl.load(source + second * x_step, inside, 0.0).to(wide)
    cos_a = tl.load(cos + angle + first, inside, 0.0).to(wide)
    cos_b = tl.load(cos + angle + second, inside, 0.0).to(wide)
    sin_a = tl.load(sin + angle + first, inside, 0.0).to(wide)
    sin_b = tl.load(sin + angle + second, inside, 0.0).to(wide)
    if BACKWARD:
        turned_a, turned_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        turned_a, turned_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(target + first, turned_a.to(y.dtype.element_ty), inside)
    tl.store(target + second, turned_b.to(y.dtype.element_ty), inside)
    if REST:
        column = tl.arange(0, REST)[None, :]
        inside = (row < rows)[:, None] & (column < rest)
        place = 2 * half + column
        tl.store(target + place, tl.load(source + place * x_step, inside, 0.0), inside)


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x * cos + R(x) * sin over the first cos.shape[-1] channels."""
    return _launch(x, cos, sin, interleaved, backward=False)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return dx = dy * cos + R^T(dy * sin)."""
    return _launch(dy, cos, sin, interleaved, backward=True)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    width = cos.shape[-1]
    y = x.new_empty(x.shape)
    x4, cos4, sin4 = _arrange(x, cos, sin)
    sizes, channels = x4.shape[:LEADING], x4.shape[LEADING]
    rows = sizes[0] * sizes[1] * sizes[2]
    half, rest = width // 2, channels - width
    block = triton.power_of_two(half)
    tail = triton.power_of_two(rest) if rest else 0
    tile = triton.tile(2 * block + tail, rows)[0]
    _turn.launch(
        (triton.blocks(rows, tile),),
        *(x4, cos4, sin4, y, rows, sizes[1], sizes[2], half, rest),
        *x4.stride(),
        # A dimension of size 1 has no step.
        *(s if n != 1 else 0 for s, n in zip(cos4.stride(), cos4.shape[:LEADING], strict=False)),
        BACKWARD=backward,
        PAIRS=interleaved,
        DOUBLE=triton.wide(x.dtype),
        ROWS=tile,
        HALF=block,
        REST=tail,
        num_warps=4,
    )
    return y


def _arrange(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three with three leading dimensions, cos and sin with neighbouring channels."""
    if x.dim() > LEADING + 1:
        shape = (*x.shape[:-1], cos.shape[-1])
        cos, sin = (t.expand(shape).flatten(0, x.dim() - 4) for t in (cos, sin))
        x = x.flatten(0, x.dim() - 4)
    missing = (1,) * (LEADING + 1 - x.dim())
    cos, sin = cos.contiguous(), sin.contiguous()
    return (
        x.view(*missing, *x.shape),
        cos.view(*missing, *cos.shape),
        sin.view(*missing, *sin.shape),
    )


BACKEND = triton.backend({"rope": (forward, backward)}, portable.BACKEND)
