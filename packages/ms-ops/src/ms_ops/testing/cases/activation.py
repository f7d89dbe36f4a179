"""Tests of the activation family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import ms_ops

from ..case import ErrorSample, OpTest, Sample, maker


def swiglu_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `swiglu`."""
    make = maker(dtype, device)
    # The last shape is larger than what a backend may take as one block of rows.
    for shape in ((4, 16), (3, 5, 62), (2,), (0, 6), (5, 0), (65, 514), (3, 211, 1026)):
        yield Sample(f"shape{shape}", (make(*shape),))
    yield Sample("dim0", (make(6, 7),), {"dim": 0})
    yield Sample("dim1", (make(3, 10, 7),), {"dim": 1})
    yield Sample("transposed", (make(14, 5).t(),))
    yield Sample("sliced", (make(5, 40)[:, 4:32:2],))
    yield Sample("large", (make(4, 16) * 30,))


def swiglu_errors() -> Iterator[ErrorSample]:
    """Yield calls of `swiglu` that must raise."""
    make = maker(torch.float32, "cpu")
    yield ErrorSample("list", ([1.0],), TypeError, "x: got list")
    yield ErrorSample("ints", (make(4).long(),), TypeError, "x: got torch.int64")
    yield ErrorSample("odd", (make(4, 7),), ValueError, "got size 7 in dim -1, need an even size")
    yield ErrorSample(
        "dim", (make(4, 8), 2), ValueError, "dim: got 2, need a dimension of x (4, 8)"
    )
    yield ErrorSample("scalar", (make(),), ValueError, "dim: got -1")


def plain_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return silu(a) * b."""
    gate, up = x.chunk(2, dim)
    return F.silu(gate) * up


TESTS = (
    OpTest(
        name="swiglu",
        function=ms_ops.swiglu,
        samples=swiglu_samples,
        errors=swiglu_errors,
        plain=plain_swiglu,
        outputs=("E1",),
        gradients={0: "E1"},
        traced=("shape(3, 5, 62)", "dim1"),
        resized=("shape(4, 16)", "shape(65, 514)"),
        grows={0: 0},
    ),
)
