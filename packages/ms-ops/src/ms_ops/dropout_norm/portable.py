"""Dropout, sum and norm for any device, the norm by torch's layer norm or our RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import compute_dtype, upcast
from ..norm import portable as rms_norm
from ..registry import Backend, Kernel
from .reference import ordered, stream_gradients
from .stream import dropped, keep_mask, pre_dtype, scaled


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    layer_scale: Tensor | None,
    rng: Tensor | None,
    p: float,
    eps: float,
    norm: str,
    prenorm: bool,
    residual_in_fp32: bool,
    return_mask: bool,
) -> tuple[Tensor, ...]:
    """Return (out, pre, mask, mean, rstd) as the reference does."""
    dropping = return_mask or p > 0
    mask = keep_mask(x, rng, p) if dropping else x.new_empty(0, dtype=torch.bool)
    r = stream(x, residual, row_scale, layer_scale, mask, p)
    scale = weight.to(r.dtype)
    if norm == "layer":
        shift = None if bias is None else bias.to(r.dtype)
        out, mean, rstd = torch.native_layer_norm(r, [r.shape[-1]], scale, shift, eps)
    else:
        out, rstd = rms_norm.forward(r, scale, eps, 0.0, "fp32")
        mean = r.new_empty(0)
    dtype = pre_dtype(x, residual, residual_in_fp32)
    pre = r.to(dtype, copy=True) if prenorm else x.new_empty(0, dtype=dtype)
    return out.to(x.dtype).contiguous(), pre.contiguous(), mask, mean, rstd


def backward(
    dout: Tensor,
    dpre: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    layer_scale: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    norm: str,
) -> tuple[Tensor, ...]:
    """Return the gradients; the sum is made again from x and residual, in the compute dtype."""
    r = stream(x, residual, row_scale, layer_scale, mask, p)
    dy, scale = upcast(dout), weight.to(r.dtype)
    dbias: Tensor | None = None
    if norm == "layer":
        shift = None if bias is None else bias.to(r.dtype)
        dr, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(),
            r,
            [r.shape[-1]],
            mean,
            rstd,
            scale,
            shift,
            [True, True, bias is not None],
        )
    else:
        dr, dweight = rms_norm.backward(dy, r, scale, rstd, 0.0, "fp32")
    if dpre is not None:
        dr = dr + dpre.to(dr.dtype)
    streams = stream_gradients(dr, x, residual, row_scale, layer_scale, mask, p)
    return ordered(x, weight, streams, dweight, dbias if bias is not None else None)


def stream(
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    layer_scale: Tensor | None,
    mask: Tensor | None,
    p: float,
) -> Tensor:
    """Return the sum that is normalised, in the compute dtype."""
    r = dropped(scaled(x, row_scale, layer_scale), mask, p)
    if residual is not None:
        r = r + residual.to(compute_dtype(x.dtype))
    return r.contiguous()


BACKEND = Backend("portable", 90, {"dropout_add_norm": Kernel(forward, backward)})
