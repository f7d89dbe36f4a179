"""Tests of the softmax family."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import ms_ops

from ..case import ErrorSample, OpTest, Sample, maker


def softmax_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `scaled_masked_softmax`."""
    make = maker(dtype, device)
    x = make(2, 3, 5, 7)
    mask = make(2, 1, 5, 7, dtype=torch.float64) > 0.3
    mask[0, 0, 2] = True
    yield Sample("plain", (x,), {"scale": 0.7})
    yield Sample("mask", (x, mask, 2.0))
    yield Sample("mask_of_keys", (x, mask[:, :, :1]))
    yield Sample("causal", (make(4, 9, 9), None, 0.5), {"causal": True})
    yield Sample("causal_and_mask", (make(2, 3, 6, 8), make(6, 8) > 1.0), {"causal": True})
    yield Sample("causal_tall", (make(1, 9, 4), None, 1.5), {"causal": True})
    yield Sample("transposed", (make(7, 5, 3, 2).permute(3, 2, 1, 0), mask))
    yield Sample("no_rows", (make(2, 0, 4),))
    yield Sample("large", (make(3, 40, 65) * 20,))
    # Sizes that fused kernels ask for; one query of it sees no key.
    tiles = make(2, 1, 32, 32) > 0.5
    tiles[1, 0, 5] = True
    yield Sample("tiles", (make(2, 1, 32, 32), tiles, 0.5), {"causal": True})
    yield Sample("tiles_plain", (make(1, 2, 64, 32),))


def softmax_errors() -> Iterator[ErrorSample]:
    """Yield calls of `scaled_masked_softmax` that must raise."""
    x = maker(torch.float32, "cpu")(2, 3, 4)
    yield ErrorSample("list", ([1.0],), TypeError, "x: got list")
    yield ErrorSample("ints", (x.long(),), TypeError, "x: got torch.int64")
    yield ErrorSample("dims", (x[0, 0],), ValueError, "x: got 1 dimensions, need 2 or more")
    yield ErrorSample("mask_dtype", (x, x), TypeError, "mask: got torch.float32, need torch.bool")
    yield ErrorSample("mask_shape", (x, x[:, :2] > 0), ValueError, "broadcasts to that of x")
    yield ErrorSample("mask_dims", (x[0], x > 0), ValueError, "mask: got (2, 3, 4)")
    yield ErrorSample("device", (x, (x > 0).to("meta")), RuntimeError, "need all tensors on one")


def plain_softmax(
    x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, causal: bool = False
) -> Tensor:
    """Return y with every step in the dtype of x."""
    scores = x * scale
    if causal:
        triangle = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        mask = triangle if mask is None else mask | triangle
    if mask is None:
        return torch.softmax(scores, -1)
    return torch.softmax(scores.masked_fill(mask, -math.inf), -1).masked_fill(mask, 0.0)


TESTS = (
    OpTest(
        name="scaled_masked_softmax",
        function=ms_ops.scaled_masked_softmax,
        samples=softmax_samples,
        errors=softmax_errors,
        plain=plain_softmax,
        outputs=("E1",),
        gradients={0: "MG"},
        traced=("causal_and_mask",),
        resized=("mask", "causal_and_mask"),
        grows={0: 0, 1: 0},
    ),
)
