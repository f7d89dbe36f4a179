"""Tests of the norm family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ms_ops

from ...device import upcast
from ..case import ErrorSample, OpTest, Sample, maker


def rms_norm_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `rms_norm_with_rstd`."""
    make = maker(dtype, device)
    both = (0, 1)
    for shape in ((4, 16), (3, 5, 63), (2, 3, 2, 100), (7, 1), (33,), (0, 8), (129, 257)):
        yield Sample(f"shape{shape}", (make(*shape), make(shape[-1])), {}, both)
    yield Sample("weight_2d", (make(3, 4, 5), make(4, 5)), {"eps": 1e-5}, both)
    yield Sample("offset", (make(5, 31), make(31)), {"weight_offset": 1.0}, both)
    yield Sample("llama", (make(5, 31), make(31)), {"casting": "llama"}, both)
    yield Sample("transposed", (make(12, 7, 5).transpose(0, 2), make(12)), {}, both)
    yield Sample("sliced", (make(6, 40)[:, 3:24:2], make(22)[::2]), {}, both)
    yield Sample("expanded", (make(1, 9).expand(4, 9), make(9)), {}, both)
    if dtype in (torch.float16, torch.bfloat16):
        yield Sample("fp32_weight", (make(6, 24), make(24, dtype=torch.float32)), {}, both)


def rms_norm_errors() -> Iterator[ErrorSample]:
    """Yield calls of `rms_norm_with_rstd` that must raise."""
    make = maker(torch.float32, "cpu")
    x, weight = make(4, 8), make(8)
    yield ErrorSample("list", ([1.0], weight), TypeError, "x: got list, need a torch.Tensor")
    yield ErrorSample("ints", (x.long(), weight), TypeError, "x: got torch.int64")
    yield ErrorSample("low_weight", (x, weight.half()), TypeError, "weight: got torch.float16")
    yield ErrorSample(
        "mixed", (x.bfloat16(), weight.half()), TypeError, "weight: got torch.float16"
    )
    yield ErrorSample("size", (x, make(4)), ValueError, "need the trailing dimensions of x (4, 8)")
    yield ErrorSample("dims", (make(8), x), ValueError, "weight: got 2 dimensions, need 1 to 1")
    yield ErrorSample("empty", (make(4, 0), make(0)), ValueError, "no empty dimension")
    yield ErrorSample("eps", (x, weight, -1.0), ValueError, "eps: got -1.0, need 0 or more")
    yield ErrorSample(
        "casting", (x, weight), ValueError, "need one of 'fp32', 'llama'", {"casting": "none"}
    )
    yield ErrorSample("device", (x, weight.to("meta")), RuntimeError, "need all tensors on one")


def plain_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    casting: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd) the way model code writes it: upcast, normalise, cast, multiply."""
    dims = tuple(range(-weight.dim(), 0))
    wide = upcast(x)
    rstd = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + eps)
    y = (wide * rstd).to(x.dtype) * (weight + weight_offset)
    return y.to(x.dtype), rstd


TESTS = (
    OpTest(
        name="rms_norm",
        function=ms_ops.rms_norm_with_rstd,
        samples=rms_norm_samples,
        errors=rms_norm_errors,
        plain=plain_rms_norm,
        outputs=("E1", "S"),
        gradients={0: "E1", 1: "MG"},
        traced=("shape(3, 5, 63)", "weight_2d"),
        resized=("shape(4, 16)", "shape(129, 257)"),
        grows={0: 0},
    ),
)
