"""Tests of grouped products of 8-bit integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ms_ops

from ...device import compute_dtype
from ...matmul.quant import activate
from ..case import ErrorSample, OpTest, Sample, maker
from .matmul import ends, plain_grouped


def quant_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `quant_grouped_matmul`; `dtype` is that of the result."""
    if dtype is torch.float64:
        return
    make = maker(torch.float32, device)

    def whole(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return (make(*shape) * 50).clamp(-127, 127).to(dtype)

    # Ascend's kernel takes bf16 scales for bf16 results, other backends any.
    own = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32

    def call(
        name: str,
        groups: Tensor,
        inner: int = 8,
        columns: int = 6,
        scale: torch.dtype = own,
        **kwargs: Any,
    ) -> Sample:
        rows, experts = int(groups[-1]), groups.shape[0]
        scales = make(experts, columns).abs().to(scale)
        args = (whole(rows, inner), whole(experts, inner, columns), scales, groups)
        return Sample(name, args, {"output_dtype": dtype, **kwargs}, ())

    yield call("plain", ends(3, 7))
    yield call("more_rows", ends(9, 20))
    yield call("wide_scale", ends(3, 7), scale=torch.float32)
    yield call("one_group", ends(5))
    yield call("empty_groups", ends(0, 4, 4, 9))
    yield call("no_rows", ends(0, 0))
    yield call("no_inner", ends(2, 5), inner=0)
    yield call("long", ends(1, 4), inner=1500)
    extra: dict[str, Any] = {
        "per_token_scale": make(7).abs() / 99,
        "bias": whole(2, 6, dtype=torch.int32),
    }
    yield call("scaled", ends(3, 7), **extra)
    for activation in ("relu", "gelu_tanh", "fast_gelu", "silu"):
        yield call(activation, ends(3, 7), activation=activation, **extra)
    yield call("unscaled_relu", ends(3, 7), activation="relu")
    yield call("one_group_bias", ends(4), bias=whole(1, 6, dtype=torch.int32))


def quant_errors() -> Iterator[ErrorSample]:
    """Yield calls of `quant_grouped_matmul` that must raise."""
    x, weight = torch.ones(4, 5).char(), torch.ones(2, 5, 3).char()
    scale, groups = torch.ones(2, 3), ends(1, 4)
    fp16 = {"output_dtype": torch.float16}

    def bad(name: str, kind: type[Exception], message: str, **kwargs: object) -> ErrorSample:
        return ErrorSample(name, (x, weight, scale, groups), kind, message, {**fp16, **kwargs})

    yield ErrorSample("float", (x.float(), weight, scale, groups), TypeError, "x: got", fp16)
    yield ErrorSample("dims", (x, weight[0], scale, groups), ValueError, "weight: got 2", fp16)
    yield ErrorSample("inner", (x[:, 1:], weight, scale, groups), ValueError, "need 4 rows", fp16)
    yield ErrorSample("scale", (x, weight, scale.half(), groups), TypeError, "scale: got", fp16)
    yield ErrorSample("shape", (x, weight, scale[1:], groups), ValueError, "need (2, 3)", fp16)
    yield ErrorSample("ends", (x, weight, scale, ends(1, 3)), ValueError, "end at row 3", fp16)
    yield bad("bias", TypeError, "bias: got torch.float32, need torch.int32", bias=scale)
    yield bad("tokens", ValueError, "per_token_scale: got (3,)", per_token_scale=torch.ones(3))
    yield bad("activation", ValueError, "activation: got 'gelu'", activation="gelu")
    yield bad("output", ValueError, "output_dtype: got torch.int8", output_dtype=torch.int8)


def plain_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    *,
    output_dtype: torch.dtype,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Return the products in floating point, then all factors."""
    y = plain_grouped(x.double(), weight.double(), offsets)
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1))
    if bias is not None:
        y = y + bias.repeat_interleave(sizes, 0)
    y = y.float() * scale.repeat_interleave(sizes, 0)
    y = y if per_token_scale is None else y * per_token_scale.unsqueeze(1)
    return activate(y, activation).to(output_dtype)


def weight_quant_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `weight_quant_grouped_matmul`."""
    make = maker(dtype, device)

    def call(name: str, groups: Tensor, inner: int = 8, columns: int = 6, **kwargs: Any) -> Sample:
        rows, experts = int(groups[-1]), groups.shape[0]
        weight = (make(experts, inner, columns, dtype=torch.float32) * 50).clamp(-127, 127).char()
        args = (make(rows, inner), weight, make(experts, columns) / 50, groups)
        return Sample(name, args, kwargs)

    yield call("plain", ends(3, 7))
    yield call("more_rows", ends(9, 20))
    yield call("empty_groups", ends(0, 4, 4, 9), weight_offset=make(4, 6))
    yield call("one_group", ends(5))
    yield call("no_rows", ends(0, 0))
    yield call("offset_and_bias", ends(3, 7), weight_offset=make(2, 6), bias=make(2, 6))
    if compute_dtype(dtype) is not dtype:
        yield call("wide_bias", ends(3, 7), bias=make(2, 6, dtype=torch.float32))
    first = call("", ends(3, 7))
    yield Sample("turned", (make(8, 7).t(), *first.args[1:]))


def weight_quant_errors() -> Iterator[ErrorSample]:
    """Yield calls of `weight_quant_grouped_matmul` that must raise."""
    x, weight = torch.ones(4, 5), torch.ones(2, 5, 3).char()
    scale, groups = torch.ones(2, 3), ends(1, 4)

    def bad(name: str, kind: type[Exception], message: str, **kwargs: object) -> ErrorSample:
        return ErrorSample(name, (x, weight, scale, groups), kind, message, kwargs)

    yield ErrorSample("ints", (x.char(), weight, scale, groups), TypeError, "x: got torch.int8")
    yield ErrorSample("rows", (x[0], weight, scale, groups), ValueError, "x: got 1 dimensions")
    yield ErrorSample("float", (x, weight.float(), scale, groups), TypeError, "need torch.int8")
    yield ErrorSample("inner", (x[:, 1:], weight, scale, groups), ValueError, "need 4 rows")
    yield ErrorSample("scale", (x, weight, scale.half(), groups), TypeError, "scale: got")
    yield ErrorSample("shape", (x, weight, scale[1:], groups), ValueError, "need (2, 3)")
    yield ErrorSample("ends", (x, weight, scale, ends(1, 3)), ValueError, "end at row 3")
    yield bad("offset", TypeError, "weight_offset: got torch.float16", weight_offset=scale.half())
    yield bad("bias", ValueError, "bias: got (1, 3), need (2, 3)", bias=scale[1:])
    learnt = scale.clone().requires_grad_()
    yield bad("learnt", ValueError, "bias: got a tensor that requires gradients", bias=learnt)
    away = (x, weight.to("meta"), scale, groups)
    yield ErrorSample("device", away, RuntimeError, "on one device")


def plain_weight_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    *,
    weight_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return products with matrices made in x's dtype."""
    matrices = weight.to(x.dtype)
    if weight_offset is not None:
        matrices = matrices + weight_offset.unsqueeze(1)
    return plain_grouped(x, matrices * scale.unsqueeze(1), offsets, bias=bias)


TESTS = (
    OpTest(
        name="quant_grouped_matmul",
        function=ms_ops.quant_grouped_matmul,
        samples=quant_samples,
        errors=quant_errors,
        plain=plain_quant,
        outputs=("E1",),
        gradients={},
        traced=("plain",),
        resized=("plain", "more_rows"),
        grows={1: 2, 2: 1},
    ),
    OpTest(
        name="weight_quant_grouped_matmul",
        function=ms_ops.weight_quant_grouped_matmul,
        samples=weight_quant_samples,
        errors=weight_quant_errors,
        plain=plain_weight_quant,
        outputs=("M",),
        gradients={0: "MG"},
        traced=("plain",),
        resized=("plain", "more_rows"),
        grows={1: 2, 2: 1},
    ),
)
