"""Weight gradients added to an accumulator in its own precision, without a rounded product.

acc += dy^T x                                       acc [N, K], x [T, K], dy [T, N]
acc[e] += x[rows of e]^T dy[rows of e]              acc [E, K, N]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_same_dtype, check_tensor, fail
from ..device import common_device, compute_dtype
from ..opdef import OpDef, define_op
from ..registry import Facts
from .groups import ends_of


def matmul_add_(acc: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    """Add the weight gradient of a linear layer to `acc` in place.

    Args:
        acc: [N, K], contiguous; fp32 for fp16, bf16 and fp32 inputs (fp64 for fp64), or the
            inputs' own dtype. With fp32 the product is never rounded to the inputs' dtype.
        x: the layer's input, [T, K], fp16, bf16, fp32 or fp64, any strides.
        dy: gradient of the layer's output, [T, N], in x's dtype.

    Returns:
        acc. Not differentiable: x and dy are taken as constants.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, acc not contiguous or requiring gradients.
        RuntimeError: tensors on different devices.
    """
    args = prepare(acc, x, dy)
    with torch.no_grad():
        MATMUL_ADD(*args)
    return acc


def grouped_matmul_add_(
    acc: Tensor,
    x: Tensor,
    dy: Tensor,
    offsets: Tensor | Sequence[int] | None = None,
    *,
    group_sizes: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Add the weight gradient of each group of rows to its part of `acc` in place.

    Args:
        acc: [E, K, N], or any contiguous shape of as many elements; dtype as in `matmul_add_`.
            The part of an empty group stays as it is.
        x: [T, K], fp16, bf16, fp32 or fp64, any strides; rows of a group follow each other.
        dy: [T, N], in x's dtype.
        offsets: [E] int32 or int64 (or a list), the row at which each group ends.
        group_sizes: [E], how many rows each group has, in place of offsets.

    Returns:
        acc. For weights [E, N, K] swap x and dy. Not differentiable.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, acc not contiguous or requiring gradients, a list of
            groups that does not cover the rows.
        RuntimeError: tensors on different devices.
    """
    args = prepare_grouped(acc, x, dy, offsets, group_sizes=group_sizes)
    with torch.no_grad():
        GROUPED_MATMUL_ADD(*args)
    return acc


def prepare(acc: Tensor, x: Tensor, dy: Tensor) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "matmul_add_"
    _check(op, acc, x, dy)
    if acc.shape != (dy.shape[1], x.shape[1]):
        need = f"({dy.shape[1]}, {x.shape[1]}), columns of dy and x"
        fail(ValueError, op, "acc", tuple(acc.shape), need)
    return acc, x, dy


def prepare_grouped(
    acc: Tensor,
    x: Tensor,
    dy: Tensor,
    offsets: Tensor | Sequence[int] | None = None,
    *,
    group_sizes: Tensor | Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "grouped_matmul_add_"
    _check(op, acc, x, dy)
    ends = ends_of(op, x.shape[0], None, offsets, group_sizes, x.device)
    shape = (ends.shape[0], x.shape[1], dy.shape[1])
    if acc.numel() != shape[0] * shape[1] * shape[2]:
        fail(ValueError, op, "acc", tuple(acc.shape), f"the elements of {shape}")
    # Even a view is an op of the dispatcher: none is made where none is needed.
    return acc if acc.shape == shape else acc.view(shape), x, dy, ends


def _check(op: str, acc: Tensor, x: Tensor, dy: Tensor) -> None:
    for argument, tensor in (("acc", acc), ("x", x), ("dy", dy)):
        check_tensor(op, argument, tensor)
    check_float(op, "x", x)
    check_same_dtype(op, "dy", dy, "x", x)
    check_float(op, "acc", acc, tuple(dict.fromkeys((compute_dtype(x.dtype), x.dtype))))
    for argument, tensor in (("x", x), ("dy", dy)):
        if tensor.dim() != 2:
            fail(ValueError, op, argument, f"{tensor.dim()} dimensions", "2")
    if dy.shape[0] != x.shape[0]:
        fail(ValueError, op, "dy", f"{dy.shape[0]} rows", f"{x.shape[0]}, those of x")
    if not acc.is_contiguous():
        fail(ValueError, op, "acc", f"strides {acc.stride()}", "a contiguous tensor")
    if acc.requires_grad:
        fail(ValueError, op, "acc", "a tensor that requires gradients", "one that does not")
    common_device(op, acc, x, dy)


def _facts(acc: Tensor, x: Tensor, dy: Tensor) -> Facts:
    return Facts(x.device.type, x.dtype, (("acc", acc.dtype),))


def _grouped_facts(acc: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> Facts:
    options = (("acc", acc.dtype), ("groups_on", offsets.device.type))
    return Facts(x.device.type, x.dtype, options)


def _fake(*_: Any) -> None:
    return None


def _flops(acc: Tensor, x: Tensor, dy: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(x.shape[1]) * int(dy.shape[1])


MATMUL_ADD = define_op(
    OpDef(
        name="matmul_add_",
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor(a!) acc, Tensor x, Tensor dy) -> ()",
        facts=_facts,
        fake=_fake,
        flops=_flops,
    )
)
GROUPED_MATMUL_ADD = define_op(
    OpDef(
        name="grouped_matmul_add_",
        family=str(__package__),
        prepare=prepare_grouped,
        schema="(Tensor(a!) acc, Tensor x, Tensor dy, Tensor offsets) -> ()",
        facts=_grouped_facts,
        fake=_fake,
        flops=_flops,
        opaque=True,
    )
)
