"""One matrix product for each group of consecutive rows.

y[rows of e] = x[rows of e] W[e] + bias[e]
dx[rows of e] = dy[rows of e] W[e]^T        dW[e] = x[rows of e]^T dy[rows of e]
dbias[e] = sum over the rows of e of dy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_same_dtype, check_tensor, fail
from ..device import autocast_dtype, common_device, compute_dtype, upcast
from ..opdef import OpDef, define_op
from ..registry import Facts
from .accumulate import grouped_matmul_add_
from .groups import ends_of

OP = "grouped_matmul"
Groups = Tensor | Sequence[int] | None


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """Multiply each group of rows of `x` by its own matrix.

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64, any strides; rows of a group follow each other.
        weight: [E, K, N] (or a transposed view of [E, N, K]) in x's dtype.
        offsets: [E] int32 or int64 (or a list), the row at which each group ends; the last is T.
            Groups may be empty. On the device of x or on the host.
        group_sizes: [E], how many rows each group has, in place of offsets.
        bias: [E, N] in x's dtype, or fp32 with fp16 and bf16 x.
        transpose_weight: weight is [E, N, K].
        accumulate_into: fp32 (fp64 for fp64) with as many elements as weight, contiguous: backward
            adds the weight's gradient to it, unrounded, and returns none for the weight. Not under
            torch.compile.

    Returns:
        Tensor [T, N] of x's dtype, contiguous. Backward saves x, weight and the ends of the groups.
        An empty group gives its weight a zero gradient.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: shapes that do not match, a list of groups that does not cover the rows (read
            on the host only, elsewhere with MS_OPS_DEBUG=1).
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        x,
        weight,
        offsets,
        group_sizes=group_sizes,
        bias=bias,
        transpose_weight=transpose_weight,
        accumulate_into=accumulate_into,
    )
    call: Callable[..., Any] = OPERATOR
    if accumulate_into is not None:
        call, args = _Accumulating.apply, (*args[:3], args[4], accumulate_into)
    y: Tensor = call(*args)
    return y


def prepare(
    x: Tensor,
    weight: Tensor,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
    accumulate_into: Tensor | None = None,
    op: str = OP,
) -> tuple[Any, ...]:
    """Check the arguments, apply the autocast policy and return the custom op's arguments."""
    for argument, tensor, dims in (("x", x, 2), ("weight", weight, 3)):
        check_tensor(op, argument, tensor)
        check_float(op, argument, tensor)
        if tensor.dim() != dims:
            fail(ValueError, op, argument, f"{tensor.dim()} dimensions", str(dims))
    cast = autocast_dtype(x.device.type)
    if cast is not None:
        x, weight = x.to(cast), weight.to(cast)
    check_same_dtype(op, "weight", weight, "x", x)
    inner, outer = (2, 1) if transpose_weight else (1, 2)
    if weight.shape[inner] != x.shape[1]:
        need = f"{x.shape[1]} in dimension {inner}, the columns of x"
        fail(ValueError, op, "weight", tuple(weight.shape), need)
    if bias is not None:
        _check_bias(op, bias, x, (weight.shape[0], weight.shape[outer]))
    common_device(op, x, weight, bias)
    if accumulate_into is not None:
        _check_accumulator(accumulate_into, weight)
        if bias is not None:
            fail(ValueError, op, "accumulate_into", "a tensor beside bias", "one of the two")
    ends = ends_of(op, x.shape[0], weight.shape[0], offsets, group_sizes, x.device)
    return x, weight, ends, bias, bool(transpose_weight)


def _check_bias(op: str, bias: Tensor, x: Tensor, shape: tuple[int, int]) -> None:
    check_tensor(op, "bias", bias)
    check_float(op, "bias", bias, tuple(dict.fromkeys((x.dtype, compute_dtype(x.dtype)))))
    if tuple(bias.shape) != shape:
        fail(ValueError, op, "bias", tuple(bias.shape), f"{shape}, groups and columns of weight")


def _check_accumulator(acc: Tensor, weight: Tensor) -> None:
    check_tensor(OP, "accumulate_into", acc)
    if acc.numel() != weight.numel():
        need = f"the elements of weight {tuple(weight.shape)}"
        fail(ValueError, OP, "accumulate_into", tuple(acc.shape), need)


class _Accumulating(torch.autograd.Function):
    """The product whose weight gradient goes into an accumulator instead of to autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool, acc: Tensor
    ) -> Tensor:
        # The accumulator changes with every backward of the step: it is not a saved tensor.
        ctx.acc, ctx.transposed = acc, transposed
        ctx.save_for_backward(x, weight, ends)
        y: Tensor = OPERATOR(x, weight, ends, None, transposed)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, ends = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = OPERATOR(dy, weight, ends, None, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            first, last = (dy, x) if ctx.transposed else (x, dy)
            grouped_matmul_add_(ctx.acc, first, last, ends)
        return dx, None, None, None, None


def _facts(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Facts:
    options = (
        ("transposed", transposed),
        ("groups_on", offsets.device.type),
        ("bias", None if bias is None else bias.dtype),
    )
    return Facts(x.device.type, x.dtype, options)


def _backward_facts(dy: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Facts:
    return _facts(x, dy, offsets, None, transposed)


def _fake(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 2]))


def _backward_fake(dy: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    first, last = (dy, x) if transposed else (x, dy)
    return x.new_empty((offsets.shape[0], first.shape[1], last.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, bias, ctx.transposed, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, offsets)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    dx = dweight = dbias = None
    if weight is not None:
        # The gradient of the rows is the same product with the matrices the other way round.
        dx = OPERATOR.forward_op(dy, weight, ends, None, not ctx.transposed, ctx.backend)
    if x is not None:
        dweight = OPERATOR.backward(dy, x, ends, ctx.transposed, ctx.backend)
    if ctx.needs_input_grad[3]:
        dbias = sum_groups(dy, ends).to(ctx.bias_dtype)
    return dx, dweight, None, dbias, None, None


def sum_groups(rows: Tensor, ends: Tensor) -> Tensor:
    """Return the sum of each group of rows, [E, N] in the compute dtype.

    A product with the groups' indicator: no value is read on the host, and the order of the sum
    does not change from run to run.
    """
    ends = ends.to(rows.device)
    places = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    group = torch.searchsorted(ends, places, right=True)
    indicator = group == torch.arange(ends.shape[0], device=rows.device).unsqueeze(1)
    wide = upcast(rows)
    return indicator.to(wide.dtype) @ wide


def _flops(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    transposed: bool,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * int(x.shape[0]) * int(weight.shape[1]) * int(weight.shape[2])


def _backward_flops(dy: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(x.shape[1]) * int(dy.shape[1])


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, bool transposed) -> Tensor",
        backward_schema="(Tensor dy, Tensor x, Tensor offsets, bool transposed) -> Tensor",
        facts=_facts,
        backward_facts=_backward_facts,
        fake=_fake,
        backward_fake=_backward_fake,
        save=_save,
        grad=_grad,
        flops=_flops,
        backward_flops=_backward_flops,
        opaque=True,
    )
)
