"""The custom ops behind the products of experts: schemas, fakes, autograd, floating operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..device import compute_dtype
from ..opdef import OpDef, Operator, define_op
from ..registry import Facts

_GROUPS = "str ep, int ep_size, str tp, int tp_size"
_operators: dict[str, Operator] = {}


def define_dispatch(name: str, prepare: Callable[..., tuple[Any, ...]]) -> Operator:
    """Register the op that gathers the rows and multiplies."""
    _operators["dispatch"] = define_op(
        OpDef(
            name=name,
            family=str(__package__),
            prepare=prepare,
            schema="(Tensor x, Tensor weight, Tensor? bias, bool by_rows, str activation,"
            f" bool keep, {_GROUPS}) -> (Tensor, Tensor, Tensor)",
            backward_schema="(Tensor dy, Tensor? dkept, Tensor? dz, Tensor? x, Tensor? weight,"
            " Tensor z, bool by_rows, str activation, bool kept, bool with_bias,"
            f" {_GROUPS}) -> (Tensor, Tensor, Tensor)",
            facts=_dispatch_facts,
            backward_facts=_dispatch_backward_facts,
            fake=_dispatch_fake,
            backward_fake=_dispatch_backward_fake,
            save=_dispatch_save,
            grad=_dispatch_grad,
            flops=_dispatch_flops,
            backward_flops=_dispatch_backward_flops,
        )
    )
    return _operators["dispatch"]


def define_combine(name: str, prepare: Callable[..., tuple[Any, ...]]) -> Operator:
    """Register the op that multiplies and sends the rows back."""
    _operators["combine"] = define_op(
        OpDef(
            name=name,
            family=str(__package__),
            prepare=prepare,
            schema=f"(Tensor x, Tensor weight, Tensor? bias, bool by_rows, {_GROUPS}) -> Tensor",
            backward_schema="(Tensor dy, Tensor? x, Tensor? weight, bool by_rows, bool with_bias,"
            f" {_GROUPS}) -> (Tensor, Tensor, Tensor)",
            facts=_combine_facts,
            backward_facts=_combine_backward_facts,
            fake=_combine_fake,
            backward_fake=_combine_backward_fake,
            save=_combine_save,
            grad=_combine_grad,
            flops=_combine_flops,
            backward_flops=_combine_backward_flops,
        )
    )
    return _operators["combine"]


def _facts(x: Tensor, bias: Tensor | None, by_rows: bool, ep_size: int, tp_size: int) -> Facts:
    options = (
        ("by_rows", by_rows),
        ("ep_size", ep_size),
        ("tp_size", tp_size),
        ("bias", None if bias is None else bias.dtype),
    )
    return Facts(x.device.type, x.dtype, options)


def _dispatch_facts(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Facts:
    return _facts(x, bias, rest[0], rest[4], rest[6])


def _dispatch_backward_facts(dy: Tensor, *rest: Any) -> Facts:
    return _facts(dy, None, rest[5], rest[-3], rest[-1])


def _combine_facts(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Facts:
    return _facts(x, bias, rest[0], rest[2], rest[4])


def _combine_backward_facts(dy: Tensor, *rest: Any) -> Facts:
    return _facts(dy, None, rest[2], rest[-3], rest[-1])


def _dispatch_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    activation: str,
    keep: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[1] * ep_size * (tp_size if by_rows else 1)
    experts, hidden, columns = weight.shape
    y = x.new_empty((experts, rows, columns))
    kept = x.new_empty((experts, rows, hidden) if keep else (0,))
    return y, kept, x.new_empty((0,) if activation == "none" else y.shape)


def _dispatch_backward_fake(
    dy: Tensor,
    dkept: Tensor | None,
    dz: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    by_rows: bool,
    activation: str,
    kept: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    experts, _, columns = dy.shape
    dx, dweight = (dy.new_empty((0,)) for _ in range(2))
    if weight is not None:
        dx = _outside(dy, weight.shape[1], by_rows, ep_size, tp_size)
    if x is not None:
        inner = x.shape[2] * (1 if kept or by_rows else tp_size)
        dweight = dy.new_empty((experts, inner, columns))
    return dx, dweight, _dbias_fake(dy, (experts, columns), with_bias)


def _combine_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> Tensor:
    return _outside(x, weight.shape[2], by_rows, ep_size, tp_size)


def _combine_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    by_rows: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    experts = dy.shape[0] // ep_size
    rows = dy.shape[1] * ep_size * (tp_size if by_rows else 1)
    hidden = dy.shape[2] * (1 if by_rows else tp_size)
    dx, dweight = (dy.new_empty((0,)) for _ in range(2))
    if weight is not None:
        dx = dy.new_empty((experts, rows, weight.shape[1]))
    if x is not None:
        dweight = dy.new_empty((experts, x.shape[2], hidden))
    return dx, dweight, _dbias_fake(dy, (experts, dy.shape[2]), with_bias)


def _outside(like: Tensor, hidden: int, by_rows: bool, ep_size: int, tp_size: int) -> Tensor:
    """Return rows as they lie outside of the experts, for [E / ep, rows, ...] inside."""
    experts, rows = like.shape[0] * ep_size, like.shape[1] // ep_size
    if by_rows:
        return like.new_empty((experts, rows // tp_size, hidden))
    return like.new_empty((experts, rows, hidden // tp_size))


def _dbias_fake(dy: Tensor, shape: tuple[int, int], with_bias: bool) -> Tensor:
    return dy.new_empty(shape if with_bias else (0,), dtype=compute_dtype(dy.dtype))


def _dispatch_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.by_rows, ctx.activation, ctx.kept, *groups, ctx.backend = inputs
    y, kept, z = output
    ctx.groups = tuple(groups)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.y_shape = y.shape
    needs = ctx.needs_input_grad
    rows = kept if ctx.kept else x
    ctx.save_for_backward(rows if needs[1] else None, weight if needs[0] else None, z)


def _dispatch_grad(
    ctx: Any, dy: Tensor | None, dkept: Tensor | None, dz: Tensor | None
) -> tuple[Any, ...]:
    x, weight, z = ctx.saved_tensors
    if not ctx.kept or weight is None:
        dkept = None
    if ctx.activation == "none":
        dz = None
    if dy is None:
        dy = z.new_zeros(ctx.y_shape)
    with_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = _operators["dispatch"].backward(
        *(dy, dkept, dz, x, weight, z, ctx.by_rows, ctx.activation, ctx.kept, with_bias),
        *ctx.groups,
        ctx.backend,
    )
    return (
        None if weight is None else dx,
        None if x is None else dweight,
        dbias.to(ctx.bias_dtype) if with_bias else None,
        *(None,) * 8,
    )


def _combine_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.by_rows, *groups, ctx.backend = inputs
    ctx.groups = tuple(groups)
    ctx.bias_dtype = None if bias is None else bias.dtype
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)


def _combine_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    with_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = _operators["combine"].backward(
        dy, x, weight, ctx.by_rows, with_bias, *ctx.groups, ctx.backend
    )
    return (
        None if weight is None else dx,
        None if x is None else dweight,
        dbias.to(ctx.bias_dtype) if with_bias else None,
        *(None,) * 6,
    )


def _dispatch_flops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    by_rows: bool,
    activation: str,
    keep: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
    *_: Any,
    **__: Any,
) -> int:
    rows = int(x.shape[1]) * ep_size * (tp_size if by_rows else 1)
    return 2 * rows * int(weight.numel())


def _dispatch_backward_flops(
    dy: Tensor,
    dkept: Tensor | None,
    dz: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    by_rows: bool,
    activation: str,
    kept: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
    *_: Any,
    **__: Any,
) -> int:
    inner = 0 if weight is None else int(weight.shape[1])
    if x is not None:
        inner += int(x.shape[2]) * (1 if kept or by_rows else tp_size)
    return 2 * int(dy.numel()) * inner


def _combine_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(x.shape[1]) * int(weight.numel())


def _combine_backward_flops(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    by_rows: bool,
    with_bias: bool,
    ep: str,
    ep_size: int,
    tp: str,
    tp_size: int,
    *_: Any,
    **__: Any,
) -> int:
    inner = 0 if x is None else int(x.shape[2])
    inner += 0 if weight is None else int(weight.shape[1])
    return 2 * int(dy.numel()) * tp_size * inner
