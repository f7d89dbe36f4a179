"""Dropout, sum and norm written out: the oracle."""

from __future__ import annotations

from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
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
    """Return (out, pre, mask, mean, rstd); empty tensors for what the call does not have."""
    wide = compute_dtype(x.dtype)
    empty = x.new_empty(0)
    mask = keep_mask(x, rng, p) if return_mask or p > 0 else empty.bool()
    r = dropped(scaled(x, row_scale, layer_scale), mask, p)
    if residual is not None:
        r = r + residual.to(wide)
    mean = r.mean(-1, keepdim=True) if norm == "layer" else empty.to(wide)
    centred = r - mean if norm == "layer" else r
    rstd = (centred.square().mean(-1, keepdim=True) + eps).pow(-0.5)
    out = centred * rstd * weight.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    dtype = pre_dtype(x, residual, residual_in_fp32)
    pre = r.to(dtype, copy=True).contiguous() if prenorm else empty.to(dtype, copy=True)
    return out.to(x.dtype).contiguous(), pre, mask, mean.contiguous(), rstd.contiguous()


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
    """Return the gradients of x, residual, weight, bias, row_scale and layer_scale."""
    wide = compute_dtype(x.dtype)
    r = dropped(scaled(x, row_scale, layer_scale), mask, p)
    if residual is not None:
        r = r + residual.to(wide)
    normed = (r - mean if norm == "layer" else r) * rstd
    dy = dout.to(wide)
    g = dy * weight.to(wide)
    dr = g - normed * (g * normed).mean(-1, keepdim=True)
    if norm == "layer":
        dr = dr - g.mean(-1, keepdim=True)
    dr = dr * rstd
    if dpre is not None:
        dr = dr + dpre.to(wide)
    rows = tuple(range(x.dim() - 1))
    dweight = (dy * normed).sum(rows) if rows else dy * normed
    dbias = (dy.sum(rows) if rows else dy) if bias is not None else None
    streams = stream_gradients(dr, x, residual, row_scale, layer_scale, mask, p)
    return ordered(x, weight, streams, dweight, dbias)


def stream_gradients(
    dr: Tensor,
    x: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    layer_scale: Tensor | None,
    mask: Tensor | None,
    p: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, residual, row_scale and layer_scale from that of the sum."""
    empty = x.new_empty(0)
    dz = dropped(dr, mask, p)
    dx = scaled(dz, row_scale, layer_scale).to(x.dtype, copy=True)
    dresidual = dr.to(residual.dtype, copy=True) if residual is not None else empty.clone()
    drow, dlayer = empty.clone(), empty.clone()
    if row_scale is not None or layer_scale is not None:
        product = dz * x.to(dz.dtype)
    if row_scale is not None:
        drow = scaled(product, None, layer_scale).sum(-1).to(x.dtype)
    if layer_scale is not None:
        rows = tuple(range(x.dim() - 1))
        whole = scaled(product, row_scale, None)
        dlayer = (whole.sum(rows) if rows else whole).to(x.dtype)
    return dx.contiguous(), dresidual.contiguous(), drow.contiguous(), dlayer.contiguous()


def ordered(
    x: Tensor, weight: Tensor, streams: tuple[Tensor, ...], dweight: Tensor, dbias: Tensor | None
) -> tuple[Tensor, ...]:
    """Return all gradients in the order of the inputs, cast; no two share memory."""
    dx, dresidual, drow, dlayer = streams
    last = x.new_empty(0) if dbias is None else dbias.to(weight.dtype, copy=True)
    return dx, dresidual, dweight.to(weight.dtype).contiguous(), last, drow, dlayer


BACKEND = Backend("reference", 100, {"dropout_add_norm": Kernel(forward, backward)})
