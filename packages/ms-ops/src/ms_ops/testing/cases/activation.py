"""Tests of the activation family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import ms_ops

from ...device import LOW_PRECISION
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


def bias_swiglu_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `bias_swiglu`."""
    make = maker(dtype, device)
    for shape in ((4, 16), (3, 5, 62), (2,), (0, 6), (5, 0), (4, 65, 1026)):
        args = (make(*shape), make(shape[-1]))
        yield Sample(f"shape{shape}", args, differentiable=(0, 1))
    yield Sample("sliced", (make(5, 40)[:, 4:32:2], make(14)), differentiable=(0, 1))
    if dtype in LOW_PRECISION:
        wide = make(16, dtype=torch.float32)
        yield Sample("wide_bias", (make(4, 16), wide), differentiable=(0, 1))


def weighted_swiglu_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `weighted_swiglu`."""
    make = maker(dtype, device)
    for shape in ((4, 16), (3, 5, 62), (2,), (0, 6), (5, 0), (4, 65, 1026)):
        args = (make(*shape), make(*shape[:-1], 1))
        yield Sample(f"shape{shape}", args, differentiable=(0, 1))
    yield Sample("flat", (make(4, 16), make(4)), differentiable=(0, 1))
    strided = make(5, 40)[:, 4:32:2], make(1, 1).expand(5, 1)
    yield Sample("sliced", strided, differentiable=(0, 1))
    if dtype in LOW_PRECISION:
        wide = make(4, 1, dtype=torch.float32)
        yield Sample("wide_weights", (make(4, 16), wide), differentiable=(0, 1))


def bias_swiglu_errors() -> Iterator[ErrorSample]:
    """Yield calls of `bias_swiglu` that must raise."""
    make = maker(torch.float32, "cpu")
    x = make(4, 8)
    yield ErrorSample("none", (x, None), TypeError, "bias: got NoneType")
    yield ErrorSample("dtype", (x, make(8).half()), TypeError, "bias: got torch.float16")
    yield ErrorSample("odd", (make(4, 7), make(7)), ValueError, "a last dimension of even size")
    yield ErrorSample("shape", (x, make(4, 8)), ValueError, "bias: got (4, 8), need [8]")


def weighted_swiglu_errors() -> Iterator[ErrorSample]:
    """Yield calls of `weighted_swiglu` that must raise."""
    make = maker(torch.float32, "cpu")
    x = make(4, 8)
    yield ErrorSample("ints", (x.long(), make(4)), TypeError, "x: got torch.int64")
    yield ErrorSample("dtype", (x, make(4).double()), TypeError, "weights: got torch.float64")
    yield ErrorSample("scalar", (make(), make()), ValueError, "a last dimension of even size")
    yield ErrorSample("shape", (x, make(8)), ValueError, "weights: got (8,), need (4,), one a row")


def plain_bias_swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """Return silu(a) * b of x + bias."""
    return plain_swiglu(x + bias).to(x.dtype)


def plain_weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """Return silu(a) * b * weights."""
    weights = weights if weights.dim() == x.dim() else weights.unsqueeze(-1)
    return (plain_swiglu(x) * weights).to(x.dtype)


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
    OpTest(
        name="bias_swiglu",
        function=ms_ops.bias_swiglu,
        samples=bias_swiglu_samples,
        errors=bias_swiglu_errors,
        plain=plain_bias_swiglu,
        outputs=("E1",),
        gradients={0: "E1", 1: "MG"},
        traced=("shape(3, 5, 62)",),
        resized=("shape(4, 16)", "shape(0, 6)"),
        grows={0: 0},
    ),
    OpTest(
        name="weighted_swiglu",
        function=ms_ops.weighted_swiglu,
        samples=weighted_swiglu_samples,
        errors=weighted_swiglu_errors,
        plain=plain_weighted_swiglu,
        outputs=("E1",),
        gradients={0: "E1", 1: "MG"},
        traced=("flat",),
        resized=("shape(4, 16)", "shape(0, 6)"),
        grows={0: 0, 1: 0},
    ),
)
