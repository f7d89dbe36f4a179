"""Rotary position embedding.

y = x * cos + R(x) * sin        dx = dy * cos + R^T(dy * sin)
halves: R(x) = (-x2, x1); interleaved: R(x)[2i] = -x[2i+1], R(x)[2i+1] = x[2i]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_same_dtype, check_tensor, fail
from ..device import common_device, upcast
from ..opdef import OpDef, define_op
from ..registry import Facts
from .reference import rotate


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first channels of `x` by position.

    Args:
        x: [..., D], fp16, bf16, fp32 or fp64, any strides, any layout.
        cos: as many dimensions as x, each 1 or x's size, last one R <= D, even; both halves (or
            both neighbours, when interleaved) filled. fp32 is best, also for low-precision x.
        sin: like cos.
        interleaved: pairs are neighbouring channels instead of the two halves.

    Returns:
        Tensor like x, contiguous, rounded once; channels from R on are copied. Its backward saves
        cos and sin only, and x too when they require gradients.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not broadcast, odd R, only one of cos and sin needing gradients.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = OPERATOR(*prepare(x, cos, sin, interleaved=interleaved))
    return y


def rope_freqs(
    x: Tensor, freqs: Tensor, *, mscale: float = 1.0, interleaved: bool = False
) -> Tensor:
    """Rotate `x` by the angles `freqs`, which broadcast like `cos` in `rope`.

    Args:
        x: [..., D].
        freqs: angles in radians, fp32; last dimension R <= D.
        mscale: factor of cos and sin, as YaRN uses it.
        interleaved: as in `rope`.
    """
    angles = upcast(freqs)
    cos, sin = angles.cos(), angles.sin()
    if mscale != 1.0:
        cos, sin = cos * mscale, sin * mscale
    return rope(x, cos, sin, interleaved=interleaved)


def prepare(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "rope"
    for argument, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        check_tensor(op, argument, tensor)
        check_float(op, argument, tensor)
    check_same_dtype(op, "sin", sin, "cos", cos)
    if cos.shape != sin.shape:
        fail(ValueError, op, "sin", tuple(sin.shape), f"cos's shape {tuple(cos.shape)}")
    if cos.dim() != x.dim() or x.dim() < 1:
        fail(ValueError, op, "cos", f"{cos.dim()} dimensions", f"{max(x.dim(), 1)}, those of x")
    if any(c not in (1, n) for c, n in zip(cos.shape[:-1], x.shape[:-1], strict=True)):
        fail(ValueError, op, "cos", tuple(cos.shape), f"sizes 1 or those of x {tuple(x.shape)}")
    if cos.shape[-1] % 2 or cos.shape[-1] > x.shape[-1]:
        need = f"an even last dimension of at most {x.shape[-1]}"
        fail(ValueError, op, "cos", tuple(cos.shape), need)
    if cos.requires_grad != sin.requires_grad:
        fail(ValueError, op, "cos", "requires_grad unlike sin", "gradients for both or neither")
    common_device(op, x, cos, sin)
    return x, cos, sin, bool(interleaved)


def _facts(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Facts:
    return Facts(x.device.type, x.dtype, (("trig", cos.dtype), ("interleaved", interleaved)))


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.interleaved, ctx.backend = inputs
    ctx.trig_grad = ctx.needs_input_grad[1]
    ctx.save_for_backward(cos, sin, *([x] if ctx.trig_grad else []))


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *saved = ctx.saved_tensors
    dx = OPERATOR.backward(dy, cos, sin, ctx.interleaved, ctx.backend)
    dcos = dsin = None
    if ctx.trig_grad:
        dcos, dsin = _trig_grad(dy, saved[0], cos, ctx.interleaved)
    return dx, dcos, dsin, None, None


def _trig_grad(dy: Tensor, x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return (dcos, dsin): dy * x and dy * R(x), summed over the broadcast dimensions."""
    width = cos.shape[-1]
    dtype = torch.promote_types(upcast(x).dtype, cos.dtype)
    turned, grad = x[..., :width].to(dtype), dy[..., :width].to(dtype)
    dcos = (grad * turned).sum_to_size(cos.shape)
    dsin = (grad * rotate(turned, interleaved)).sum_to_size(cos.shape)
    return dcos.to(cos.dtype), dsin.to(cos.dtype)


OPERATOR = define_op(
    OpDef(
        name="rope",
        family=__name__,
        prepare=prepare,
        schema="(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
        backward_schema="(Tensor dy, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
        facts=_facts,
        backward_facts=_facts,
        fake=_fake,
        backward_fake=_fake,
        save=_save,
        grad=_grad,
        flops=None,
        backward_flops=None,
    )
)
