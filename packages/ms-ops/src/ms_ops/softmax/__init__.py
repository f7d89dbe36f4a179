"""Softmax of scaled scores under a mask, for attention that writes its scores out.

y = softmax(scale * x) over the last dimension, 0 where masked; a row that is all masked is 0
dx = scale * y * (dy - sum(dy * y))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..device import common_device
from ..opdef import OpDef, define_op
from ..registry import Facts

OP = "scaled_masked_softmax"


def scaled_masked_softmax(
    x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, causal: bool = False
) -> Tensor:
    """Return the softmax of `scale * x` over the last dimension.

    Args:
        x: scores [..., rows, keys]; fp16, bf16, fp32 or fp64, any strides.
        mask: bool, broadcasts to x, True where a key is left OUT (as Megatron's masks and Ascend's
            kernel have it; `attention` means the opposite).
        scale: factor of the scores.
        causal: leave out the keys behind the diagonal that starts in the upper left corner too.

    Returns:
        y like x, computed in fp32 and rounded once. Masked places are exactly 0, all of them in a
        row without any key. Backward saves y and the mask.

    Raises:
        TypeError: x is no floating-point tensor, or the mask is not bool.
        ValueError: x has fewer than two dimensions, or the mask does not broadcast to it.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = OPERATOR(*prepare(x, mask, scale, causal=causal))
    return y


def prepare(
    x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, causal: bool = False
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_tensor(OP, "x", x)
    check_float(OP, "x", x)
    if x.dim() < 2:
        fail(ValueError, OP, "x", f"{x.dim()} dimensions", "2 or more: rows and keys are the last")
    if mask is not None:
        check_tensor(OP, "mask", mask)
        if mask.dtype is not torch.bool:
            fail(TypeError, OP, "mask", mask.dtype, "torch.bool, True where a key is left out")
        tail = x.shape[x.dim() - mask.dim() :] if mask.dim() <= x.dim() else ()
        if mask.dim() > x.dim() or any(
            m not in (1, n) for m, n in zip(mask.shape, tail, strict=True)
        ):
            need = f"a shape that broadcasts to that of x, {tuple(x.shape)}"
            fail(ValueError, OP, "mask", tuple(mask.shape), need)
    common_device(OP, x, mask)
    return x, mask, float(scale), bool(causal)


def _facts(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Facts:
    return Facts(x.device.type, x.dtype, (("mask", mask is not None), ("causal", causal)))


def _backward_facts(dy: Tensor, y: Tensor, *rest: Any) -> Facts:
    return _facts(y, *rest)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.scale, ctx.causal, ctx.backend = inputs
    ctx.save_for_backward(output, mask)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, mask = ctx.saved_tensors
    return OPERATOR.backward(dy, y, mask, ctx.scale, ctx.causal, ctx.backend), *[None] * 4


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=__name__,
        prepare=prepare,
        schema="(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
        backward_schema="(Tensor dy, Tensor y, Tensor? mask, float scale, bool causal) -> Tensor",
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

__all__ = ["scaled_masked_softmax"]
