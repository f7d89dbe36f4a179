"""Dropout, sum with the residual stream and normalisation in one operator.

z = x * row_scale * layer_scale      d = z * mask / (1 - p)      r = d + residual
layer: out = (r - mean) * rstd * weight + bias      rms: out = r * rstd * weight

With g = dout * weight and rhat the normalised r, dr = rstd * (g - rhat * mean(g * rhat)), less
rstd * mean(g) for "layer", plus the gradient of the stream r itself. From there
dresidual = dr      dz = dr * mask / (1 - p)      dx = dz * row_scale * layer_scale
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..device import compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts
from .arguments import OP, prepare

Norm = Literal["layer", "rms"]

_OPTIONS = "Tensor? row_scale, Tensor? layer_scale"
_SCHEMA = (
    f"(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, {_OPTIONS}, Tensor? rng, float p,"
    " float eps, str norm, bool prenorm, bool residual_in_fp32, bool return_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor dout, Tensor? dpre, Tensor x, Tensor? residual, Tensor weight, Tensor? bias,"
    f" {_OPTIONS}, Tensor? mask, Tensor mean, Tensor rstd, float p, str norm)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    p: float,
    eps: float,
    norm: Norm = "layer",
    row_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_mask: bool = False,
    training: bool = True,
    dropout_rng: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise `dropout(x * row_scale * layer_scale) + residual` over its last dimension.

    Args:
        x: [..., H], fp16, bf16, fp32 or fp64, any strides.
        residual: [..., H] in x's dtype, or fp32 with fp16 and bf16 x; None for zero.
        weight: [H], likewise.
        bias: [H] in weight's dtype, or None; must be None with norm "rms".
        p: probability to drop, 0 to 1; what is kept is divided by 1 - p.
        eps: added to the variance, or to the mean square.
        norm: "layer" or "rms".
        row_scale: [...] in x's dtype, one factor a row.
        layer_scale: [H] in x's dtype, one factor a column.
        prenorm: return the sum before the norm too, for the next residual.
        residual_in_fp32: without a residual, that sum is fp32; with one it has the dtype of it.
        return_mask: return which elements were kept.
        training: False switches dropout off.
        dropout_rng: int64 [2], seed and offset: the same pair drops the same elements, on every
            backend and in any order of work. None draws it from torch's generator.

    Returns:
        `out`, or a tuple (out, pre, mask) without those that were not asked for. out has x's dtype;
        mask is bool [..., H], True where kept. All is computed in fp32 (fp64 for fp64), and out
        and pre are rounded once each.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, p outside of 0 to 1, a negative eps, unknown norm.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        x,
        residual,
        weight,
        bias,
        p=p,
        eps=eps,
        norm=norm,
        row_scale=row_scale,
        layer_scale=layer_scale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_mask=return_mask,
        training=training,
        dropout_rng=dropout_rng,
    )
    out, pre, mask, _, _ = OPERATOR(*args)
    asked = ((pre, prenorm), (mask, return_mask))
    extra = tuple(tensor for tensor, wanted in asked if wanted)
    return (out, *extra) if extra else out


def _facts(x: Tensor, residual: Tensor | None, weight: Tensor, *rest: Any) -> Facts:
    p, norm = rest[4], rest[6]
    options = (("norm", norm), ("dropout", p > 0), ("weight", weight.dtype))
    return Facts(x.device.type, x.dtype, options)


def _backward_facts(dout: Tensor, dpre: Tensor | None, x: Tensor, *rest: Any) -> Facts:
    weight, p, norm = rest[1], rest[8], rest[9]
    options = (("norm", norm), ("dropout", p > 0), ("weight", weight.dtype))
    return Facts(x.device.type, x.dtype, options)


def _fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    p, _, norm, prenorm, in_fp32, return_mask = rest[5:]
    wide = compute_dtype(x.dtype)
    dtype = residual.dtype if residual is not None else wide if in_fp32 else x.dtype
    rows = [*x.shape[:-1], 1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if prenorm else (0,), dtype=dtype),
        x.new_empty(x.shape if return_mask or p > 0 else (0,), dtype=torch.bool),
        x.new_empty(rows if norm == "layer" else (0,), dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _backward_fake(dout: Tensor, dpre: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    residual, weight, bias, row_scale, layer_scale = rest[:5]
    inputs = (x, residual, weight, bias, row_scale, layer_scale)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.p, _, ctx.norm, ctx.prenorm, _, _, ctx.backend = inputs
    _, pre, mask, mean, rstd = output
    ctx.mark_non_differentiable(*(() if ctx.prenorm else (pre,)), mask, mean, rstd)
    # A mask of ones that was asked for at p = 0 is not worth keeping.
    ctx.save_for_backward(*tensors, mask if ctx.p > 0 else None, mean, rstd)


def _grad(ctx: Any, dout: Tensor, dpre: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = OPERATOR.backward(
        dout, dpre if ctx.prenorm else None, *saved, ctx.p, ctx.norm, ctx.backend
    )
    inputs = saved[:6]
    return *(None if t is None else g for t, g in zip(inputs, found, strict=True)), *[None] * 8


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=__name__,
        prepare=prepare,
        schema=_SCHEMA,
        backward_schema=_BACKWARD_SCHEMA,
        facts=_facts,
        backward_facts=_backward_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=None,
        backward_flops=None,
    )
)

__all__ = ["dropout_add_norm"]
