"""Tests of feed-forward layers; with gradients they are a composition, tested as its parts are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ms_ops

from ..case import ErrorSample, OpTest, Sample, maker
from .matmul import ends, plain_grouped

GATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu"}


def ffn_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `ffn`."""
    make = maker(dtype, device)

    def call(name: str, activation: str, *lead: int, biases: bool = True, **kwargs: Any) -> Sample:
        # Large enough that errors of two products do not depend on luck.
        rows, inner = int(kwargs["offsets"][-1]) if lead else 9, 24
        outer = 2 * inner if activation in GATED else inner
        given = {"bias1": make(*lead, outer), "bias2": make(*lead, 7)} if biases else {}
        args = (make(rows, 16), make(*lead, 16, outer), make(*lead, inner, 7), activation)
        return Sample(name, args, {**given, **kwargs}, ())

    for activation in ("gelu", "fastgelu", "relu", "silu", *GATED):
        yield call(activation, activation)
    yield call("experts", "silu", 3, biases=False, offsets=ends(2, 2, 9))
    yield call("more_rows", "silu", 3, biases=False, offsets=ends(4, 9, 14))
    yield call("experts_biases", "fastgelu", 2, offsets=ends(3, 8))
    yield call("gated_experts", "swiglu", 2, offsets=ends(3, 8))
    deep, _, last, _ = call("", "relu").args
    turned = make(24, 16).t()
    yield Sample("dimensions", (deep.view(9, 1, 16), turned, last, "relu"), {}, ())
    yield Sample("no_rows", (deep[:0], turned, last, "gelu"), {}, ())
    if dtype in (torch.float16, torch.bfloat16):
        wide = {"bias1": make(24, dtype=torch.float32), "bias2": make(7, dtype=torch.float32)}
        yield Sample("wide_biases", (deep, turned, last, "silu"), wide, ())


def ffn_errors() -> Iterator[ErrorSample]:
    """Yield calls of `ffn` that must raise."""
    make = maker(torch.float32, "cpu")
    x, one, two = make(4, 5), make(5, 6), make(6, 3)
    args = (x, one, two, "relu")
    listed = {"offsets": ends(1, 4)}
    yield ErrorSample("activation", (*args[:3], "tanh"), ValueError, "activation: got 'tanh'")
    yield ErrorSample("list", ([1.0], *args[1:]), TypeError, "x: got list")
    yield ErrorSample("mixed", (x, one.half(), two, "relu"), TypeError, "weight1: got torch.flo")
    yield ErrorSample("rows", (x, two, one, "relu"), ValueError, "weight1: got 6 rows, need 5")
    yield ErrorSample("lists", args, ValueError, "need offsets or group_sizes", listed)
    bias = {"bias1": make(5)}
    yield ErrorSample("bias", args, ValueError, "bias1: got (5,), need (6,)", bias)
    experts = (x, one.expand(2, 5, 6), two.expand(2, 6, 3), "relu")
    both = {"offsets": ends(1, 4), "group_sizes": [1, 3]}
    yield ErrorSample("two_lists", experts, ValueError, "got offsets and group_sizes", both)
    short = {"offsets": ends(1, 3)}
    yield ErrorSample("ends", experts, ValueError, "end at row 3", short)
    away = (x, one.to("meta"), two, "relu")
    yield ErrorSample("device", away, RuntimeError, "need all tensors on one device")


def plain_ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    offsets: Tensor | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """Return the layer in the dtype of its inputs."""
    rows = x.reshape(-1, x.shape[-1])
    hidden = _plain_product(rows, weight1, offsets, bias1)
    if activation in GATED:
        gate, up = hidden.chunk(2, -1)
        hidden = _plain_activation(gate, GATED[activation]) * up
    else:
        hidden = _plain_activation(hidden, activation)
    out = _plain_product(hidden, weight2, offsets, bias2)
    return out.view(*x.shape[:-1], -1) if out.numel() else out.view(*x.shape[:-1], out.shape[-1])


def _plain_product(
    rows: Tensor, weight: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    if offsets is not None:
        return plain_grouped(rows, weight, offsets, bias=bias)
    y = rows @ weight
    return y if bias is None else (y + bias).to(rows.dtype)


def _plain_activation(z: Tensor, name: str) -> Tensor:
    if name == "fastgelu":
        return z * torch.sigmoid(1.702 * z)
    function: Any = getattr(F, name)
    y: Tensor = function(z)
    return y


TESTS = (
    OpTest(
        name="ffn",
        function=ms_ops.ffn,
        samples=ffn_samples,
        errors=ffn_errors,
        plain=plain_ffn,
        # Two products, one after the other.
        outputs=("MG",),
        gradients={},
        traced=("experts",),
        resized=("experts", "more_rows"),
        grows={2: 2},
    ),
)
