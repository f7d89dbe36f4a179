"""The custom ops behind the products: one schema and autograd formula, told apart by groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..device import compute_dtype
from ..opdef import OpDef, Operator, define_op
from ..registry import Facts

_OPERATORS: dict[str, Operator] = {}


class Ways(NamedTuple):
    """Where rows are gathered and sums are reduced; a name is "" where no other rank takes part.

    Attributes:
        gather: name of the group whose ranks' rows are stacked.
        gather_size: its ranks.
        reduce: name of the group over which the product is summed.
        reduce_size: its ranks.
        scatter: whether each rank keeps its part of the rows of the sum.
    """

    gather: str
    gather_size: int
    reduce: str
    reduce_size: int
    scatter: bool


def define_product(name: str, prepare: Callable[..., tuple[Any, ...]]) -> Operator:
    """Register one of the products."""
    _OPERATORS[name] = define_op(
        OpDef(
            name=name,
            family=str(__package__),
            prepare=prepare,
            schema="(Tensor a, Tensor b, Tensor? bias, bool transposed, bool keep, str gather,"
            " int gather_size, str reduce, int reduce_size, bool scatter) -> (Tensor, Tensor)",
            backward_schema="(Tensor dy, Tensor? dkept, Tensor? a, Tensor? b, bool transposed,"
            " bool kept, bool with_bias, str gather, int gather_size, str reduce,"
            " int reduce_size, bool scatter) -> (Tensor, Tensor, Tensor)",
            facts=_facts,
            backward_facts=_backward_facts,
            fake=_fake,
            backward_fake=_backward_fake,
            save=_save,
            grad=partial(_grad, name),
            flops=_flops,
            backward_flops=_backward_flops,
        )
    )
    return _OPERATORS[name]


def _facts(
    a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool, keep: bool, *ways: Any
) -> Facts:
    sizes = Ways(*ways)
    options = (
        ("gather_size", sizes.gather_size),
        ("reduce_size", sizes.reduce_size),
        ("bias", None if bias is None else bias.dtype),
        ("transposed", transposed),
    )
    return Facts(a.device.type, a.dtype, options)


def _backward_facts(
    dy: Tensor,
    dkept: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    transposed: bool,
    kept: bool,
    with_bias: bool,
    *ways: Any,
) -> Facts:
    return _facts(dy, dy, None, transposed, kept, *ways)


def _fake(
    a: Tensor, b: Tensor, bias: Tensor | None, transposed: bool, keep: bool, *given: Any
) -> tuple[Tensor, Tensor]:
    ways = Ways(*given)
    rows = a.shape[0] * ways.gather_size
    kept = a.new_empty((rows, a.shape[1]) if keep else (0,))
    own = rows // ways.reduce_size if ways.scatter else rows
    return a.new_empty((own, b.shape[0 if transposed else 1])), kept


def _backward_fake(
    dy: Tensor,
    dkept: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    transposed: bool,
    kept: bool,
    with_bias: bool,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    ways, columns = Ways(*given), dy.shape[1]
    rows = dy.shape[0] * (ways.reduce_size if ways.scatter else 1) // ways.gather_size
    da = dy.new_empty((0,) if b is None else (rows, b.shape[1 if transposed else 0]))
    db = dy.new_empty((0,))
    if a is not None:
        db = dy.new_empty((columns, a.shape[1]) if transposed else (a.shape[1], columns))
    dbias = dy.new_empty((columns if with_bias else 0,), dtype=compute_dtype(dy.dtype))
    return da, db, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, bias, ctx.transposed, ctx.kept, *ways, ctx.backend = inputs
    ctx.ways = tuple(ways)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    rows = output[1] if ctx.kept else a
    ctx.save_for_backward(rows if needs[1] else None, b if needs[0] else None)


def _grad(op: str, ctx: Any, dy: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    if not ctx.kept or b is None:
        dkept = None
    if dy is None:
        if dkept is None:
            return (None,) * (6 + len(ctx.ways))
        dy = _no_gradient(dkept, b, ctx.transposed, Ways(*ctx.ways))
    da, db, dbias = _OPERATORS[op].backward(
        dy,
        dkept,
        a,
        b,
        ctx.transposed,
        ctx.kept,
        ctx.bias_dtype is not None,
        *ctx.ways,
        ctx.backend,
    )
    return (
        None if b is None else da,
        None if a is None else db,
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        *(None,) * (3 + len(ctx.ways)),
    )


def _no_gradient(dkept: Tensor, b: Tensor, transposed: bool, ways: Ways) -> Tensor:
    """Return the gradient of a product that nothing depends on."""
    rows = dkept.shape[0] // (ways.reduce_size if ways.scatter else 1)
    return dkept.new_zeros((rows, b.shape[0 if transposed else 1]))


def _flops(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    transposed: bool,
    keep: bool,
    gather: str,
    gather_size: int,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * int(a.shape[0]) * gather_size * int(b.shape[0]) * int(b.shape[1])


def _backward_flops(
    dy: Tensor,
    dkept: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    transposed: bool,
    kept: bool,
    with_bias: bool,
    gather: str,
    gather_size: int,
    reduce: str,
    reduce_size: int,
    scatter: bool,
    *_: Any,
    **__: Any,
) -> int:
    entries = int(dy.numel()) * (reduce_size if scatter else 1)
    inner = [0 if a is None else int(a.shape[1])]
    inner += [0 if b is None else int(b.shape[1 if transposed else 0])]
    return 2 * entries * sum(inner)
