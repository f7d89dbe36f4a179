"""A small checked expression language over configuration names.

Names, constants, comparisons, `in`, `and`/`or`/`not` and integer arithmetic; no calls, no
attributes, no subscripts. Text is parsed by `ast` and walked by hand; nothing is ever executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mindspeed.patching.suggest import nearest

_LIMIT = 400

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISON: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_CONSTANTS = (int, float, str, bool, type(None))


class ExprError(ValueError):
    """An expression is malformed, names something undeclared, or cannot be evaluated."""


@dataclass(frozen=True)
class Expr:
    """One parsed expression.

    Attributes:
        text: as written.
        names: every name it reads.
    """

    text: str
    names: frozenset[str]

    def check(self, declared: Iterable[str]) -> None:
        """Raise `ExprError` if a name is not among the declared ones."""
        known = frozenset(declared)
        for name in sorted(self.names - known):
            hint = nearest(name, known)
            raise ExprError(f"expression {self.text!r}: name {name!r} is not declared{hint}")

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """The value of the expression; `values` must hold every name of `names`."""
        try:
            return _value(_parse(self.text), values)
        except KeyError as error:
            raise ExprError(f"expression {self.text!r}: no value for {error}") from None
        except (TypeError, ZeroDivisionError) as error:
            given = ", ".join(f"{name}={values[name]!r}" for name in sorted(self.names))
            raise ExprError(f"expression {self.text!r} with {given}: {error}") from None


@lru_cache(maxsize=1024)
def parse(text: str) -> Expr:
    """Parse and check one expression.

    Raises:
        ExprError: a syntax error, or a construct outside the language.
    """
    body = _parse(text)
    for node in ast.walk(body):
        _check_node(node, text)
    return Expr(text, frozenset(n.id for n in ast.walk(body) if isinstance(n, ast.Name)))


@lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    if not isinstance(text, str) or not text.strip() or len(text) > _LIMIT:
        raise ExprError(f"an expression must be 1 to {_LIMIT} characters of text, got {text!r}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ExprError(f"expression {text!r}: {error.msg}") from None


_PLAIN: tuple[type[ast.AST], ...] = (ast.Name, ast.Load, ast.Tuple, ast.BinOp, ast.Compare)
_PLAIN += (ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub)


def _check_node(node: ast.AST, text: str) -> None:
    if isinstance(node, (*_PLAIN, *_ARITHMETIC, *_COMPARISON)):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, _CONSTANTS):
        return
    raise ExprError(f"expression {text!r}: {type(node).__name__} is not part of the language")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, values) for item in node.elts)
    if isinstance(node, ast.BoolOp):
        return _bool_op(node, values)
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, values)
        return (not operand) if isinstance(node.op, ast.Not) else -operand
    if isinstance(node, ast.BinOp):
        return _arithmetic(node, values)
    assert isinstance(node, ast.Compare)
    return _compare(node, values)


def _bool_op(node: ast.BoolOp, values: Mapping[str, Any]) -> Any:
    stop_at = isinstance(node.op, ast.Or)
    value: Any = None
    for part in node.values:
        value = _value(part, values)
        if bool(value) is stop_at:
            break
    return value


def _arithmetic(node: ast.BinOp, values: Mapping[str, Any]) -> Any:
    left, right = _value(node.left, values), _value(node.right, values)
    for side in (left, right):
        # Text and lists also multiply; only numbers are meant here.
        if not isinstance(side, (int, float)):
            raise TypeError(f"{side!r} is not a number")
    return _ARITHMETIC[type(node.op)](left, right)


def _compare(node: ast.Compare, values: Mapping[str, Any]) -> bool:
    left = _value(node.left, values)
    for comparison, right_node in zip(node.ops, node.comparators, strict=True):
        right = _value(right_node, values)
        if not _COMPARISON[type(comparison)](left, right):
            return False
        left = right
    return True
