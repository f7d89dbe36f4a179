"""Tests of the rope family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ms_ops

from ...rope.reference import rotate
from ..case import ErrorSample, OpTest, Sample, maker


def rope_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `rope`."""
    make = maker(dtype, device)

    def trig(*shape: int, of: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        angles = make(*shape, dtype=torch.float64) * 3
        of = torch.float64 if dtype is torch.float64 else of
        return angles.cos().to(of), angles.sin().to(of)

    for interleaved in (False, True):
        kwargs = {"interleaved": interleaved}
        tag = "pairs" if interleaved else "halves"
        yield Sample(f"sbnd_{tag}", (make(7, 2, 3, 8), *trig(7, 1, 1, 8)), kwargs)
        yield Sample(f"bnsd_{tag}", (make(2, 3, 5, 6), *trig(1, 1, 5, 6)), kwargs)
        yield Sample(f"partial_{tag}", (make(5, 2, 3, 10), *trig(5, 1, 1, 4)), kwargs)
        packed = make(5, 2, 3, 24)[..., 8:16]
        yield Sample(f"sliced_{tag}", (packed, *trig(5, 2, 1, 8)), kwargs)
        yield Sample(f"trig_grad_{tag}", (make(4, 2, 3, 6), *trig(4, 1, 1, 6)), kwargs, (0, 1, 2))
    yield Sample("tnd", (make(11, 3, 8), *trig(11, 1, 8)))
    # Larger than what a backend may take as one block.
    yield Sample("blocks_sbnd", (make(130, 1, 40, 64), *trig(130, 1, 1, 64)))
    yield Sample("blocks_bnsd", (make(3, 20, 70, 64), *trig(1, 1, 70, 64)))
    yield Sample("empty", (make(0, 2, 3, 8), *trig(0, 1, 1, 8)))
    yield Sample("no_channels", (make(4, 1, 2, 6), *trig(4, 1, 1, 0)))
    yield Sample("transposed", (make(2, 3, 9, 8).transpose(1, 2), *trig(1, 9, 1, 8)))
    if dtype in (torch.float16, torch.bfloat16):
        yield Sample("low_trig", (make(7, 2, 3, 8), *trig(7, 1, 1, 8, of=dtype)))


def rope_errors() -> Iterator[ErrorSample]:
    """Yield calls of `rope` that must raise."""
    make = maker(torch.float32, "cpu")
    x, trig = make(5, 2, 3, 8), make(5, 1, 1, 8)
    grad = trig.clone().requires_grad_()
    yield ErrorSample("list", (x, [1.0], trig), TypeError, "cos: got list")
    yield ErrorSample("ints", (x.long(), trig, trig), TypeError, "x: got torch.int64")
    yield ErrorSample("trig_dtype", (x, trig, trig.half()), TypeError, "sin: got torch.float16")
    yield ErrorSample("trig_shape", (x, trig, make(5, 1, 1, 6)), ValueError, "need cos's shape")
    yield ErrorSample("dims", (x, make(5, 8), make(5, 8)), ValueError, "cos: got 2 dimensions")
    yield ErrorSample("rows", (x, make(4, 1, 1, 8), make(4, 1, 1, 8)), ValueError, "sizes 1 or")
    yield ErrorSample("odd", (x, make(5, 1, 1, 7), make(5, 1, 1, 7)), ValueError, "an even last")
    yield ErrorSample("wide", (x, make(5, 1, 1, 10), make(5, 1, 1, 10)), ValueError, "at most 8")
    yield ErrorSample("one_grad", (x, grad, trig), ValueError, "gradients for both or neither")
    yield ErrorSample("device", (x, trig.to("meta"), trig.to("meta")), RuntimeError, "one device")


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return the rotation with cos and sin cast to x's dtype."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    y = turned * cos.to(x.dtype) + rotate(turned, interleaved) * sin.to(x.dtype)
    return torch.cat((y, rest), -1)


TESTS = (
    OpTest(
        name="rope",
        function=ms_ops.rope,
        samples=rope_samples,
        errors=rope_errors,
        plain=plain_rope,
        outputs=("E1",),
        gradients={0: "E1", 1: "MG", 2: "MG"},
        traced=("sbnd_halves", "trig_grad_pairs"),
        resized=("sbnd_halves", "partial_halves"),
        grows={0: 1},
    ),
)
