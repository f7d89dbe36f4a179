"""Tests of dropout, sum and norm in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ms_ops

from ...dropout_norm.stream import keep_mask
from ..case import ErrorSample, OpTest, Sample, maker

RNG = (5, 3)


def dropout_add_norm_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `dropout_add_norm`."""
    make = maker(dtype, device)
    rng = {"dropout_rng": torch.tensor(RNG, device=device)}
    plain: dict[str, Any] = {"p": 0.0, "eps": 1e-5}
    rms: dict[str, Any] = {"p": 0.0, "eps": 1e-6, "norm": "rms"}
    drop: dict[str, Any] = {"p": 0.3, "eps": 1e-5, **rng}
    x, residual, weight, bias = make(2, 2, 5), make(2, 2, 5), make(5), make(5)
    scales = {"row_scale": make(2, 2), "layer_scale": make(5)}
    asked = {"prenorm": True, "return_mask": True}
    all_four, named = (0, 1, 2, 3), ("row_scale", "layer_scale")
    yield Sample("layer", (x, residual, weight, bias), plain, all_four)
    larger = (make(11, 2, 43), make(11, 2, 43), make(43), make(43))
    yield Sample("larger", larger, plain, all_four)
    whole = {**drop, **scales, **asked}
    kept = {**plain, **scales, "prenorm": True}
    yield Sample("scales", (x, residual, weight, bias), kept, (*all_four, *named))
    yield Sample("whole", (x, residual, weight, bias), whole, (*all_four, *named))
    whole = {**drop, **scales, **asked, "norm": "rms"}
    yield Sample("rms_whole", (x, residual, weight), whole, (0, 1, 2, *named))
    yield Sample("rms", (make(4, 7), None, make(7)), {**rms, "row_scale": make(4)}, (0, 2))
    yield Sample("mask_of_ones", (make(9), None, make(9), make(9)), {**plain, **asked}, (0, 2, 3))
    one = {**drop, **asked, "p": 1.0, "layer_scale": make(6)}
    yield Sample("all_dropped", (make(3, 6), make(3, 6), make(6)), one, (0, 1, 2, "layer_scale"))
    yield Sample("eval", (make(3, 8), make(3, 8), make(8)), {**drop, "training": False}, (0, 1, 2))
    # Large enough to show what it is added to.
    yield Sample("eps", (make(3, 8), make(3, 8), make(8)), {**plain, "eps": 0.5}, (0, 1, 2))
    yield Sample("rms_eps", (make(3, 8), make(3, 8), make(8)), {**rms, "eps": 0.5}, (0, 1, 2))
    turned = (make(3, 4).t(), make(4, 6)[:, ::2], make(6)[::2], make(3))
    yield Sample("strided", turned, {**drop, "prenorm": True}, all_four)
    yield Sample("no_rows", (make(0, 4), make(0, 4), make(4), make(4)), drop, all_four)
    if dtype in (torch.float16, torch.bfloat16):
        wide = (make(4, 8, dtype=torch.float32), make(8, dtype=torch.float32))
        yield Sample("fp32_stream", (make(4, 8), *wide), {**drop, "prenorm": True}, (0, 1, 2))
        first = {**rms, "prenorm": True, "residual_in_fp32": True}
        yield Sample("fp32_first", (make(4, 8), None, make(8)), first, (0, 2))


def dropout_add_norm_errors() -> Iterator[ErrorSample]:
    """Yield calls of `dropout_add_norm` that must raise."""
    make = maker(torch.float32, "cpu")
    x, w = make(2, 3, 8), make(8)
    fine: dict[str, Any] = {"p": 0.0, "eps": 1e-5}
    low = (x.bfloat16(), None, w.half())
    for name, args, kind, message in (
        ("list", ([1.0], None, w), TypeError, "x: got list, need a torch.Tensor"),
        ("ints", (x.long(), None, w), TypeError, "x: got torch.int64"),
        ("number", (x[0, 0, 0], None, w), ValueError, "x: got 0 dimensions, need 1 or more"),
        ("mixed", low, TypeError, "weight: got torch.float16"),
        ("weight", (x, x, w[:4]), ValueError, "weight: got (4,), need (8,)"),
        ("empty", (x[..., :0], None, w[:0]), ValueError, "weight: got (0,), need no empty"),
        ("bias", (x, x, w, w[:4]), ValueError, "bias: got (4,), need (8,), the shape of weight"),
        ("bias_dtype", (x, x, w, w.half()), TypeError, "bias: got torch.float16"),
        ("residual", (x, x[0], w), ValueError, "residual: got (3, 8), need (2, 3, 8)"),
        ("residual_dtype", (x, x.half(), w), TypeError, "residual: got torch.float16"),
        ("device", (x, x, w.to("meta")), RuntimeError, "need all tensors on one device"),
    ):
        yield ErrorSample(name, args, kind, message, fine)
    both = (x, x, w, w)
    for name, kind, message, wrong in (
        ("p", ValueError, "p: got 1.5, need 0 to 1", {"p": 1.5}),
        ("eps", ValueError, "eps: got -1.0, need 0 or more", {"eps": -1.0}),
        ("norm", ValueError, "norm: got 'batch', need one of 'layer'", {"norm": "batch"}),
        ("rms_bias", ValueError, "bias: got a tensor, need None", {"norm": "rms"}),
        ("rows", ValueError, "row_scale: got (8,), need (2, 3)", {"row_scale": w}),
        ("rows_dtype", TypeError, "row_scale: got torch.int64", {"row_scale": x[..., 0].long()}),
        ("layer", ValueError, "layer_scale: got (2, 3, 8), need (8,)", {"layer_scale": x}),
        ("layer_dtype", TypeError, "layer_scale: got torch.float16", {"layer_scale": w.half()}),
        ("rng", ValueError, "dropout_rng: got torch.float32 (8,)", {"dropout_rng": w, "p": 0.5}),
    ):
        yield ErrorSample(name, both, kind, message, {**fine, **wrong})


def call(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """Return (out, pre, mask) of `dropout_add_norm`, None for what was not asked for."""
    prenorm, masked = kwargs.get("prenorm", False), kwargs.get("return_mask", False)
    found = ms_ops.dropout_add_norm(*args, **kwargs)
    out, *extra = found if isinstance(found, tuple) else (found,)
    pre = extra[0] if prenorm else None
    return out, pre, extra[-1] if masked else None


def plain_dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    p: float,
    eps: float,
    norm: str = "layer",
    row_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_mask: bool = False,
    training: bool = True,
    dropout_rng: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (out, pre, mask) the way model code writes it, every step in the dtypes given."""
    keeps = 1 - p if training else 1.0
    mask = keep_mask(x, dropout_rng, p) if keeps < 1 else torch.ones_like(x, dtype=torch.bool)
    z = x if row_scale is None else x * row_scale.unsqueeze(-1)
    z = z if layer_scale is None else z * layer_scale
    r = z * mask / (keeps or 1.0)
    if residual is not None:
        r = r + residual
    elif residual_in_fp32:
        r = r.float()
    mean = r.mean(-1, keepdim=True) if norm == "layer" else 0.0
    out = (r - mean) * torch.rsqrt((r - mean).square().mean(-1, keepdim=True) + eps) * weight
    out = out if bias is None else out + bias
    return out.to(x.dtype), r if prenorm else None, mask if return_mask else None


TESTS = (
    OpTest(
        name="dropout_add_norm",
        function=call,
        samples=dropout_add_norm_samples,
        errors=dropout_add_norm_errors,
        plain=plain_dropout_add_norm,
        outputs=("E1", "E1", "X"),
        gradients={0: "E1", 1: "E1", 2: "MG", 3: "MG", "row_scale": "MG", "layer_scale": "MG"},
        traced=("scales",),
        resized=("layer", "larger"),
        grows={0: 0, 1: 0},
        differentiable_outputs=(0, 1),
    ),
)
