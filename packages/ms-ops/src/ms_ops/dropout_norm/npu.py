"""Dropout, sum and norm by torch_npu's kernels that add and normalise in one pass.

The mask is a function of the place, drawn by torch's integer operators: the kernel for dropout
draws its own from a stream that no other backend has. The sum reaches the norm in fp32, so that it
is not rounded before; the kernels' documents leave open whether they round it with 16-bit operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..device import upcast
from ..registry import Backend, Kernel
from . import portable
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
    if x.numel() == 0 or (residual is None and norm == "layer"):
        options = (rng, p, eps, norm, prenorm, residual_in_fp32, return_mask)
        return portable.forward(x, residual, weight, bias, row_scale, layer_scale, *options)
    dropping = return_mask or p > 0
    mask = keep_mask(x, rng, p) if dropping else x.new_empty(0, dtype=torch.bool)
    d = dropped(scaled(x, row_scale, layer_scale), mask, p).contiguous()
    scale, mean = upcast(weight).contiguous(), d.new_empty(0)
    stream = None if residual is None else upcast(residual).contiguous()
    if norm == "layer":
        shift = torch.zeros_like(scale) if bias is None else upcast(bias).contiguous()
        out, mean, rstd, r = npu.op("npu_add_layer_norm")(
            d, stream, scale, shift, epsilon=eps, additional_output=True
        )
    elif stream is not None:
        out, rstd, r = npu.op("npu_add_rms_norm")(d, stream, scale, epsilon=eps)
    else:
        (out, rstd), r = npu.op("npu_rms_norm")(d, scale, epsilon=eps), d
    dtype = pre_dtype(x, residual, residual_in_fp32)
    pre = r.to(dtype, copy=True) if prenorm else x.new_empty(0, dtype=dtype)
    return out.to(x.dtype), pre, mask, mean, rstd


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
    """Return the gradients; layer norm's backward is torch's own operator."""
    scales = (row_scale, layer_scale, mask)
    if norm == "layer" or x.numel() == 0:
        args = (dout, dpre, x, residual, weight, bias, *scales)
        return portable.backward(*args, mean, rstd, p, norm)
    r = portable.stream(x, residual, *scales, p)
    scale = upcast(weight).contiguous()
    dr, dweight = npu.op("npu_rms_norm_backward")(upcast(dout).contiguous(), r, scale, rstd)
    if dpre is not None:
        dr = dr + dpre.to(dr.dtype)
    return ordered(x, weight, stream_gradients(dr, x, residual, *scales, p), dweight, None)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"dropout_add_norm": Kernel(forward, backward, npu.declines)},
    npu.available,
)
