"""Gated activations.

(a, b) = halves of x      y = a * sigmoid(a) * b
da = dy * b * s * (1 + a * (1 - s)),  db = dy * a * s,  s = sigmoid(a)
with a bias: x + bias in the place of x, dbias = sum of dx over rows
with weights: y * w,  dw = sum over a row of dy * y,  dy * w in the place of dy
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..opdef import OpDef, define_op
from ..registry import Facts
from .forms import bias_swiglu, weighted_swiglu


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return silu of the first half of `x` along `dim`, times the second half.

    Args:
        x: [..., 2H, ...], fp16, bf16, fp32 or fp64, any strides.
        dim: the dimension that holds both halves; its size must be even.

    Returns:
        Tensor [..., H, ...] of x's dtype, contiguous, rounded once. Its backward saves only x.

    Raises:
        TypeError: x is no tensor or has no floating dtype.
        ValueError: dim out of range, odd size.
    """
    y: Tensor = OPERATOR(*prepare(x, dim))
    return y


def prepare(x: Tensor, dim: int = -1) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_tensor("swiglu", "x", x)
    check_float("swiglu", "x", x)
    if not -x.dim() <= dim < x.dim():
        fail(ValueError, "swiglu", "dim", dim, f"a dimension of x {tuple(x.shape)}")
    if x.shape[dim] % 2:
        fail(ValueError, "swiglu", "x", f"size {x.shape[dim]} in dim {dim}", "an even size")
    return x, dim


def _facts(x: Tensor, dim: int) -> Facts:
    return Facts(x.device.type, x.dtype, (("last_dim", dim in (-1, x.dim() - 1)),))


def _backward_facts(dy: Tensor, x: Tensor, dim: int) -> Facts:
    return _facts(x, dim)


def _fake(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // 2
    return x.new_empty(shape)


def _backward_fake(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.backend = inputs
    ctx.save_for_backward(x)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return OPERATOR.backward(dy, x, ctx.dim, ctx.backend), None, None


OPERATOR = define_op(
    OpDef(
        name="swiglu",
        family=__name__,
        prepare=prepare,
        schema="(Tensor x, int dim) -> Tensor",
        backward_schema="(Tensor dy, Tensor x, int dim) -> Tensor",
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

__all__ = ["bias_swiglu", "swiglu", "weighted_swiglu"]
