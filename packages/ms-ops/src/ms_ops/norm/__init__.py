"""Root-mean-square normalisation.

rstd = (mean(x^2) + eps)^(-1/2)        y = x * rstd * (weight + weight_offset)
g = dy * (weight + weight_offset)      dx = rstd * (g - xhat * mean(g * xhat)),  xhat = x * rstd
dweight = sum over rows of dy * xhat
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_tensor, fail
from ..device import LOW_PRECISION, common_device, compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts

Casting = Literal["fp32", "llama"]
CASTINGS = ("fp32", "llama")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    casting: Casting = "fp32",
) -> Tensor:
    """Normalise `x` over its trailing dimensions by their root mean square.

    Args:
        x: [..., *weight.shape], fp16, bf16, fp32 or fp64, any strides.
        weight: one or more trailing dimensions of x, in x's dtype, or fp32 with fp16 and bf16 x.
        eps: added to the mean square.
        weight_offset: added to the weight; 1.0 for zero-centred weights.
        casting: "fp32" rounds once at the end; "llama" also rounds the normalised x to x's dtype
            before the weight, as many reference implementations do.

    Returns:
        Tensor like x, contiguous. Its backward saves x, weight and one number a row.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, an empty normalised dimension, unknown casting.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = rms_norm_with_rstd(x, weight, eps, weight_offset=weight_offset, casting=casting)[0]
    return y


def rms_norm_with_rstd(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    casting: Casting = "fp32",
) -> tuple[Tensor, Tensor]:
    """Like `rms_norm`, and return rstd too.

    Returns:
        (y, rstd); rstd is fp32 (fp64 for fp64), x's shape with the normalised dimensions 1, and
        not differentiable.
    """
    args = prepare(x, weight, eps, weight_offset=weight_offset, casting=casting)
    y, rstd = OPERATOR(*args)
    return y, rstd


def prepare(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    casting: str = "fp32",
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "rms_norm"
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    check_float(op, "x", x)
    wanted = (x.dtype, torch.float32) if x.dtype in LOW_PRECISION else (x.dtype,)
    check_float(op, "weight", weight, wanted)
    check_choice(op, "casting", casting, CASTINGS)
    if not 1 <= weight.dim() <= x.dim():
        fail(ValueError, op, "weight", f"{weight.dim()} dimensions", f"1 to {x.dim()}, those of x")
    if x.shape[x.dim() - weight.dim() :] != weight.shape:
        need = f"the trailing dimensions of x {tuple(x.shape)}"
        fail(ValueError, op, "weight", tuple(weight.shape), need)
    if weight.numel() == 0:
        fail(ValueError, op, "weight", tuple(weight.shape), "no empty dimension")
    if eps < 0:
        fail(ValueError, op, "eps", eps, "0 or more")
    common_device(op, x, weight)
    return x, weight, float(eps), float(weight_offset), casting


def _facts(x: Tensor, weight: Tensor, eps: float, weight_offset: float, casting: str) -> Facts:
    options = (("weight", weight.dtype), ("offset", weight_offset != 0.0), ("casting", casting))
    return Facts(x.device.type, x.dtype, options)


def _backward_facts(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, casting: str
) -> Facts:
    return _facts(x, weight, 0.0, weight_offset, casting)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = [*x.shape[: x.dim() - weight.dim()], *[1] * weight.dim()]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=compute_dtype(x.dtype))


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.weight_offset, ctx.casting, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _grad(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = OPERATOR.backward(
        dy, x, weight, rstd, ctx.weight_offset, ctx.casting, ctx.backend
    )
    return dx, dweight, None, None, None, None


OPERATOR = define_op(
    OpDef(
        name="rms_norm",
        family=__name__,
        prepare=prepare,
        schema="(Tensor x, Tensor weight, float eps, float weight_offset, str casting)"
        " -> (Tensor, Tensor)",
        backward_schema="(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float weight_offset,"
        " str casting) -> (Tensor, Tensor)",
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
