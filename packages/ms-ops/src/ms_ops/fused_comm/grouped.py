"""Products of groups of rows, summed over the ranks that hold parts of the inner dimension.

y[rows of e] = sum over ranks of x_r[rows of e] W_r[e] + bias[e]
Backward is that of `ms_ops.grouped_matmul` with the one dy that all ranks hold: nothing is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..device import compute_dtype
from ..matmul import grouped as plain
from ..matmul.grouped import Groups
from ..opdef import OpDef, define_op
from ..registry import Facts
from .groups import named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "grouped_matmul_all_reduce"


def grouped_matmul_all_reduce(
    x: Tensor,
    weight: Tensor,
    group: ProcessGroup,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
) -> Tensor:
    """Multiply each group of rows by its own matrix and sum over the ranks.

    Args:
        x: [T, K], fp16, bf16, fp32 or fp64, any strides; K may differ from rank to rank.
        weight: [E, K, N] (or a transposed view of [E, N, K]) in x's dtype.
        group: the ranks that hold parts of K.
        offsets: [E] as in `ms_ops.grouped_matmul`, the same on all ranks.
        group_sizes: [E], how many rows each group has, in place of offsets.
        bias: [E, N] in x's dtype, or fp32 with fp16 and bf16 x; the same on all ranks, added once.
        transpose_weight: weight is [E, N, K].

    Returns:
        Tensor [T, N] of x's dtype, contiguous, the same on all ranks. Backward takes that one
        gradient on every rank.

    Raises:
        TypeError: an argument that is no tensor or no group, a dtype that does not fit.
        ValueError: shapes that do not match, a list of groups that does not cover the rows.
        RuntimeError: tensors on different devices.
    """
    args = prepare(
        x,
        weight,
        group,
        offsets,
        group_sizes=group_sizes,
        bias=bias,
        transpose_weight=transpose_weight,
    )
    y: Tensor = OPERATOR(*args)
    return y


def prepare(
    x: Tensor,
    weight: Tensor,
    group: ProcessGroup,
    offsets: Groups = None,
    *,
    group_sizes: Groups = None,
    bias: Tensor | None = None,
    transpose_weight: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    args = plain.prepare(
        x,
        weight,
        offsets,
        group_sizes=group_sizes,
        bias=bias,
        transpose_weight=transpose_weight,
        op=OP,
    )
    return *args, *named(OP, "group", group)


def _facts(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, *rest: Any) -> Facts:
    transposed, _, size = rest
    options = (
        ("reduce_size", size),
        ("transposed", transposed),
        ("groups_on", offsets.device.type),
        ("bias", None if bias is None else bias.dtype),
    )
    return Facts(x.device.type, x.dtype, options)


def _backward_facts(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    with_bias: bool,
) -> Facts:
    return _facts(dy, dy, offsets, None, transposed, "", 1)


def _fake(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool, *_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 2]))


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = dy.shape
    groups = offsets.shape[0]
    dx = dy.new_empty((0,) if weight is None else (rows, weight.shape[2 if transposed else 1]))
    dweight = dy.new_empty((0,))
    if x is not None:
        sizes = (columns, x.shape[1]) if transposed else (x.shape[1], columns)
        dweight = dy.new_empty((groups, *sizes))
    shape = (groups, columns) if with_bias else (0,)
    return dx, dweight, dy.new_empty(shape, dtype=compute_dtype(dy.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, bias, ctx.transposed, _, _, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, offsets)


def _grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, offsets = ctx.saved_tensors
    with_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = OPERATOR.backward(
        dy, x, weight, offsets, ctx.transposed, with_bias, ctx.backend
    )
    return (
        None if weight is None else dx,
        None if x is None else dweight,
        None,
        dbias.to(ctx.bias_dtype) if with_bias else None,
        *(None,) * 4,
    )


def _flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[0]) * int(weight.shape[1]) * int(weight.shape[2])


def _backward_flops(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    *_: Any,
    **__: Any,
) -> int:
    inner = 0 if x is None else int(x.shape[1])
    inner += 0 if weight is None else int(weight.shape[2 if transposed else 1])
    return 2 * int(dy.numel()) * inner


OPERATOR = define_op(
    OpDef(
        name=OP,
        family=str(__package__),
        prepare=prepare,
        schema="(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, bool transposed,"
        " str group, int size) -> Tensor",
        backward_schema="(Tensor dy, Tensor? x, Tensor? weight, Tensor offsets, bool transposed,"
        " bool with_bias) -> (Tensor, Tensor, Tensor)",
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
