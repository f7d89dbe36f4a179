"""Turn the places where Megatron's source names CUDA into look-ups on one object.

Each place becomes an attribute of (or a call on) the object bound to :data:`NAME` in the module's
globals, see :mod:`mindspeed.device.lookup`. The rewritten code names no device: one cached
file serves CPU and NPU, and switching the look-up off gives back what was written.

====  ==========================================  =====================================
kind  written                                     becomes
====  ==========================================  =====================================
K1    ``torch.cuda``                              ``NAME.cuda``
K2    ``"cuda"``                                  ``NAME.type``
K3    ``"cuda:1"``, also the head of an f-string  ``NAME.type + ":1"``
K4    ``x.cuda(...)``                             ``NAME.to_device(x, ...)``
K5    ``x.is_cuda``                               ``NAME.is_dev(x)``
K6    ``from torch.cuda import a as b``           ``b = NAME.import_name("torch.cuda", "a")``
K7    ``f(pin_memory=True)``, ``x.pin_memory()``  ``f(pin_memory=NAME.pin)``, ``NAME.pinned(x)``
K8    ``"torch.cuda.FloatTensor"``                ``NAME.typestr("FloatTensor")``
K9    ``"nccl"``                                  ``NAME.backend``
====  ==========================================  =====================================

Docstrings, comments and longer names such as ``cuda_rng_state`` stay as they are.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import TypeVar

NAME = "_mindspeed_device"
# Part of the cache file's name: change it whenever the rewriting changes.
VERSION = 1
MARKS = (b"cuda", b"nccl", b"pin_memory")
_TENSOR_TYPE = re.compile(r"torch\.cuda\.(\w+Tensor)")
_Node = TypeVar("_Node", bound=ast.AST)


def needs_rewrite(source: bytes) -> bool:
    """Whether a source file can contain a place of the kinds K1 to K9."""
    return any(mark in source for mark in MARKS)


def rewrite(source: bytes | str, filename: str = "<megatron>") -> tuple[ast.Module, Counter[str]]:
    """Parse ``source`` and rewrite its places.

    Returns:
        The module's tree with the positions of the original, and the number of places by kind.
    """
    rewriter = _Rewriter()
    tree = rewriter.visit(ast.parse(source, filename))
    return ast.fix_missing_locations(tree), rewriter.counts


def count_places(tree: ast.Module) -> Counter[str]:
    """Places of the kinds K1 to K9 left in ``tree``; the tree is consumed."""
    rewriter = _Rewriter()
    rewriter.visit(tree)
    return rewriter.counts


class _Rewriter(ast.NodeTransformer):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def _lookup(self, kind: str, attribute: str, at: ast.AST) -> ast.Attribute:
        self.counts[kind] += 1
        return _at(at, ast.Attribute(ast.Name(NAME, ast.Load()), attribute, ast.Load()))

    def _call(self, kind: str, method: str, at: ast.AST, *args: ast.expr) -> ast.Call:
        return _at(at, ast.Call(self._lookup(kind, method, at), list(args), []))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return node  # a docstring
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        value = node.value
        if not isinstance(value, str):
            return node
        if value == "cuda":
            return self._lookup("K2", "type", node)
        if value == "nccl":
            return self._lookup("K9", "backend", node)
        if value.startswith("cuda:"):
            return _at(
                node, ast.BinOp(self._lookup("K3", "type", node), ast.Add(), _tail(node, value))
            )
        if match := _TENSOR_TYPE.fullmatch(value):
            return self._call("K8", "typestr", node, ast.Constant(match[1]))
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        parts: list[ast.expr] = []
        for index, part in enumerate(node.values):
            if not isinstance(part, ast.Constant):
                parts.append(self.visit(part))
            elif index == 0 and str(part.value).startswith("cuda:"):
                head = ast.FormattedValue(self._lookup("K3", "type", part), -1, None)
                parts += [_at(part, head), _tail(part, str(part.value))]
            else:
                parts.append(part)
        node.values = parts
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "cuda" and _is_torch(node.value) and isinstance(node.ctx, ast.Load):
            return self._lookup("K1", "cuda", node)
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            return self._call("K5", "is_dev", node, self.visit(node.value))
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "cuda" and not _is_torch(node.func.value):
                self._to_method("K4", "to_device", node, node.func)
            elif node.func.attr == "pin_memory":
                self._to_method("K7", "pinned", node, node.func)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory" and _is_true(keyword.value):
                keyword.value = self._lookup("K7", "pin", keyword.value)
        return self.generic_visit(node)

    def _to_method(self, kind: str, name: str, node: ast.Call, method: ast.Attribute) -> None:
        node.args.insert(0, method.value)
        node.func = self._lookup(kind, name, method)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        if node.level or not _is_cuda_module(node.module):
            return node
        return [
            self._bind(node, alias.asname or alias.name, str(node.module), alias.name)
            for alias in node.names
        ]

    def visit_Import(self, node: ast.Import) -> ast.AST | list[ast.stmt]:
        out: list[ast.stmt] = []
        for alias in node.names:
            if alias.asname and _is_cuda_module(alias.name):
                out.append(self._bind(node, alias.asname, *alias.name.rsplit(".", 1)))
            else:
                out.append(_at(node, ast.Import([alias])))
        return out

    def _bind(self, node: ast.stmt, target: str, module: str, name: str) -> ast.Assign:
        value = self._call("K6", "import_name", node, ast.Constant(module), ast.Constant(name))
        return _at(node, ast.Assign([ast.Name(target, ast.Store())], value))


def _at(origin: ast.AST, node: _Node) -> _Node:
    return ast.copy_location(node, origin)


def _tail(origin: ast.AST, value: str) -> ast.Constant:
    return _at(origin, ast.Constant(value.removeprefix("cuda")))


def _is_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_cuda_module(name: str | None) -> bool:
    return name is not None and (name == "torch.cuda" or name.startswith("torch.cuda."))
