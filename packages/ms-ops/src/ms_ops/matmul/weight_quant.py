"""Grouped products with matrices of 8-bit integers, which are brought to the rows' dtype.

y = x W[e] + bias[e]                    W[e] = (weight[e] + weight_offset[e]) * scale[e]
dx = dy W[e]^T                          W computed in fp32 (fp64 for fp64), rounded once
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_float, check_tensor, fail
from ..device import common_device, compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts
from .grouped import Groups
from .groups import ends_of
from .quant import check_columns, check_integers

OP = "weight_quant_grouped_matmul"


def weight_quant_grouped_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    weight_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply groups of rows by 8-bit matrices that are brought to x's dtype first.

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64; rows of a group follow each other.
        weight: [E, K, N] int8.
        scale: [E, N] in x's dtype.
        offsets: [E], the row at which each group ends, as in `grouped_matmul`.
        group_sizes: [E], rows of each group, in place of offsets.
        weight_offset: [E, N] in x's dtype, added to the weight before it is scaled.
        bias: [E, N] in x's dtype, or fp32 with fp16 and bf16 x.

    Returns:
        Tensor [T, N] in x's dtype, differentiable in x. The matrices are computed in fp32 and
        rounded once; backward saves the 8-bit weight and computes them again.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, a list of groups that does not cover the rows, scale,
            weight_offset or bias that require gradients.
        RuntimeError: tensors on different devices.
    """
    y: Tensor = OPERATOR(
        *prepare(
            x,
            weight,
            scale,
            offsets,
            group_sizes=group_sizes,
            weight_offset=weight_offset,
            bias=bias,
        )
    )
    return y


def prepare(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    weight_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    check_tensor(OP, "x", x)
    check_float(OP, "x", x)
    if x.dim() != 2:
        fail(ValueError, OP, "x", f"{x.dim()} dimensions", "2")
    check_integers(OP, "weight", weight, 3)
    if weight.shape[1] != x.shape[1]:
        fail(ValueError, OP, "weight", tuple(weight.shape), f"{x.shape[1]} rows, the columns of x")
    shape, wide = (weight.shape[0], weight.shape[2]), compute_dtype(x.dtype)
    own = (x.dtype,)
    named = (("scale", scale, own), ("weight_offset", weight_offset, own), ("bias", bias, ()))
    for name, tensor, dtypes in named:
        if name != "scale" and tensor is None:
            continue
        check_columns(OP, name, tensor, shape, dtypes or tuple(dict.fromkeys((x.dtype, wide))))
        if tensor is not None and tensor.requires_grad:
            fail(ValueError, OP, name, "a tensor that requires gradients", "a constant")
    common_device(OP, x, weight, scale, weight_offset, bias)
    ends = ends_of(OP, x.shape[0], weight.shape[0], offsets, group_sizes, x.device)
    return x, weight, scale, ends, weight_offset, bias


def matrices(weight: Tensor, scale: Tensor, weight_offset: Tensor | None) -> Tensor:
    """Return the matrices [E, K, N] in the dtype of scale."""
    wide = weight.to(compute_dtype(scale.dtype))
    if weight_offset is not None:
        wide += weight_offset.unsqueeze(1)
    return wide.mul_(scale.unsqueeze(1)).to(scale.dtype)


def _facts(x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, *rest: Any) -> Facts:
    bias = rest[1] if len(rest) > 1 else None
    options = (("groups_on", offsets.device.type), ("bias", None if bias is None else bias.dtype))
    return Facts(x.device.type, x.dtype, options)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _backward_fake(dy: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = OPERATOR.backward(dy, *ctx.saved_tensors, ctx.backend)
    return (dx, *[None] * 6)


def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(weight.shape[1]) * int(weight.shape[2])


_MATRICES = "Tensor weight, Tensor scale, Tensor offsets, Tensor? weight_offset"

OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema=f"(Tensor x, {_MATRICES}, Tensor? bias) -> Tensor",
        backward_schema=f"(Tensor dy, {_MATRICES}) -> Tensor",
        facts=_facts,
        backward_facts=_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=_flops,
        backward_flops=_flops,
        opaque=True,
    )
)
