"""SwiGLU with a bias before it or a weight a row after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..device import LOW_PRECISION, common_device
from ..opdef import OpDef, define_op
from ..registry import Facts

FAMILY = __package__ or ""


def bias_swiglu(x: Tensor, bias: Tensor) -> Tensor:
    """Return SwiGLU of `x + bias` over the last dimension; the sum is never stored or rounded.

    Args:
        x: [..., 2H], fp16, bf16, fp32 or fp64, any strides.
        bias: [2H], in x's dtype, or fp32 with fp16 and bf16 x.

    Returns:
        Tensor [..., H] of x's dtype, contiguous, rounded once. Its backward saves x and bias.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: an odd size, or a bias of another shape.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = BIAS(*prepare_bias(x, bias))
    return y


def weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of `x` over the last dimension, each row times its weight.

    For experts: the weight of a token is applied here, between the two products.

    Args:
        x: [..., 2H], fp16, bf16, fp32 or fp64, any strides.
        weights: [...] or [..., 1], in x's dtype, or fp32 with fp16 and bf16 x.

    Returns:
        Tensor [..., H] of x's dtype, contiguous, rounded once. Its backward saves x and weights.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: an odd size, or weights of another shape.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = WEIGHTED(*prepare_weighted(x, weights))
    return y


def prepare_bias(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments of `bias_swiglu` and return those of the custom op."""
    _check("bias_swiglu", x, "bias", bias)
    if bias.shape != x.shape[-1:]:
        fail(ValueError, "bias_swiglu", "bias", tuple(bias.shape), f"[{x.shape[-1]}]")
    return x, bias


def prepare_weighted(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments of `weighted_swiglu` and return those of the custom op."""
    _check("weighted_swiglu", x, "weights", weights)
    rows = x.shape[:-1]
    if weights.shape not in (rows, (*rows, 1)):
        need = f"{tuple(rows)}, one a row of x {tuple(x.shape)}"
        fail(ValueError, "weighted_swiglu", "weights", tuple(weights.shape), need)
    return x, weights if weights.dim() == x.dim() else weights.unsqueeze(-1)


def _check(op: str, x: Tensor, name: str, other: Tensor) -> None:
    check_tensor(op, "x", x)
    check_tensor(op, name, other)
    check_float(op, "x", x)
    check_float(op, name, other, _dtypes(x))
    if x.dim() == 0 or x.shape[-1] % 2:
        fail(ValueError, op, "x", tuple(x.shape), "a last dimension of even size")
    common_device(op, x, other)


def _dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (x.dtype, torch.float32) if x.dtype in LOW_PRECISION else (x.dtype,)


def _facts(x: Tensor, other: Tensor) -> Facts:
    return Facts(x.device.type, x.dtype, (("other", other.dtype),))


def _backward_facts(dy: Tensor, x: Tensor, other: Tensor) -> Facts:
    return _facts(x, other)


def _fake(x: Tensor, other: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], x.shape[-1] // 2])


def _backward_fake(dy: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), other.new_empty(other.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, other, ctx.backend = inputs
    ctx.save_for_backward(x, other)


def _define(name: str, other: str, prepare: Any) -> Any:
    def grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dother = operator.backward(dy, *ctx.saved_tensors, ctx.backend)
        return dx, dother, None

    operator = define_op(
        OpDef(
            name=name,
            family=FAMILY,
            prepare=prepare,
            schema=f"(Tensor x, Tensor {other}) -> Tensor",
            backward_schema=f"(Tensor dy, Tensor x, Tensor {other}) -> (Tensor, Tensor)",
            facts=_facts,
            backward_facts=_backward_facts,
            fake=_fake,
            backward_fake=_backward_fake,
            save=_save,
            grad=grad,
            flops=None,
            backward_flops=None,
        )
    )
    return operator


BIAS = _define("bias_swiglu", "bias", prepare_bias)
WEIGHTED = _define("weighted_swiglu", "weights", prepare_weighted)
