"""Where a meter finds the formula of an operator.

In this order: what `register_flops` was given; the formulas of this package; the attribute
`flop_formula` of the operator (`torch.ops.lib.op.flop_formula`), by which a library states its
FLOPs without importing anything, None for no product; torch's own registry
(`torch.utils.flop_counter`); the list of operators without a product. An operator found nowhere is
unknown.

A formula is called as torch calls its raw ones: `formula(*args, **kwargs, out_val=result)`. One
that has a parameter `attention` is told which count is wanted and can tell masked from full. In
place of an integer it may return an object whose `resolve()` gives it later, which a meter calls
when its counts are read: so a formula need not wait for numbers on a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload

from . import attention, matmul, npu
from .attention import Attention, Pending
from .known import has_no_product

# (args, kwargs, result) to FLOPs.
Counter = Callable[[Sequence[Any], Mapping[str, Any], Any], "int | Pending"]

_BUILT_IN: dict[str, Callable[..., int | Pending]] = {
    **matmul.FORMULAS,
    **attention.FORMULAS,
    **npu.FORMULAS,
}
_registered: dict[str, Callable[..., int | Pending] | None] = {}


_UNSTATED = object()


class UnknownOperator(RuntimeError):
    """An operator that may multiply matrices has no formula."""


def register_flops(op: str, formula: Callable[..., int | Pending] | None) -> None:
    """State the FLOPs of an operator, before a meter sees it; a second formula replaces the first.

    Args:
        op: "namespace::name"; the operator need not exist yet.
        formula: called as `formula(*args, **kwargs, out_val=result)`, with `attention=` too if it
            has that parameter; None for an operator that multiplies no matrices.

    Raises:
        ValueError: `op` is not of that form.
    """
    namespace, colons, name = op.partition("::")
    if not (colons and namespace.isidentifier() and name.isidentifier()):
        raise ValueError(f"register_flops: op: got {op!r}, need 'namespace::name'")
    _registered[op] = formula


def name_of(func: OpOverload | HigherOrderOperator) -> str:
    """Return "namespace::name" of an operator."""
    if isinstance(func, HigherOrderOperator):
        return f"{func.namespace}::{func.name()}"
    return func._schema.name


def find(func: OpOverload | HigherOrderOperator, kind: Attention) -> Counter | None:
    """Return how to count an operator, None when it has no matrix product.

    Raises:
        UnknownOperator: nobody has said.
    """
    name = name_of(func)
    if name in _registered:
        formula = _registered[name]
    elif name in _BUILT_IN and isinstance(func, OpOverload):
        return _by_name(func, _BUILT_IN[name], kind)
    else:
        formula = _stated(func, name)
    return None if formula is None else _as_called(formula, kind)


def _stated(
    func: OpOverload | HigherOrderOperator, name: str
) -> Callable[..., int | Pending] | None:
    packet = func._overloadpacket if isinstance(func, OpOverload) else func
    stated: Any = getattr(packet, "flop_formula", _UNSTATED)
    formula: Callable[..., int | Pending] | None = stated
    if stated is not _UNSTATED:
        return formula
    formula = _torch(packet)
    if formula is None and not has_no_product(name):
        raise UnknownOperator(
            f"{name} may multiply matrices and has no FLOP formula: give one with "
            f"ms_profile.register_flops({name!r}, formula), or None if it multiplies none"
        )
    return formula


def _torch(packet: Any) -> Callable[..., int] | None:
    # Imported here: with Triton installed this module imports it.
    from torch.utils.flop_counter import flop_registry

    formula: Callable[..., int] | None = flop_registry.get(packet)
    return formula


def _as_called(formula: Callable[..., int | Pending], kind: Attention) -> Counter:
    takes = "attention" in inspect.signature(formula, follow_wrapped=False).parameters
    extra = {"attention": kind} if takes else {}
    return lambda args, kwargs, out: formula(*args, **kwargs, out_val=out, **extra)


def _by_name(func: OpOverload, formula: Callable[..., int | Pending], kind: Attention) -> Counter:
    """Formulas of this package take an operator's arguments by the names of its schema."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {
        argument.name: argument.default_value
        for argument in func._schema.arguments
        if argument.has_default_value()
    }

    def count(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int | Pending:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        return formula(**given, out_val=out, attention=kind)

    return count
