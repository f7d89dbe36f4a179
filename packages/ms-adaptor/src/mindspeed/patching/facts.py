"""Static facts of one name: parameters and defaults, bases, dataclass fields.

A fact is one line of text, so that a stored fingerprint can be read and compared with a diff.
A name that is defined in several branches (`try`/`except`, `if`/`else`) has one fact a branch.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

_DESCRIPTORS = ("staticmethod", "classmethod", "property")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def facts_of(module: ast.Module, path: str) -> tuple[str, ...]:
    """Facts of the attribute path `path` in a module; empty where the name does not exist."""
    *owners, name = path.split(".")
    scopes: list[list[ast.stmt]] = [module.body]
    for owner in owners:
        nodes = (node for scope in scopes for node in _bindings(scope, owner))
        scopes = [node.body for node in nodes if isinstance(node, ast.ClassDef)]
    found = [_fact(node, name) for scope in scopes for node in _bindings(scope, name)]
    return tuple(dict.fromkeys(found))


def _bindings(scope: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Every statement of a scope that binds `name`, inside its branches too."""
    for node in scope:
        if name in _names(node):
            yield node
        for block in _blocks(node):
            yield from _bindings(block, name)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {leaf.id for target in node.targets for leaf in _leaves(target)}
    if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        return {leaf.id for leaf in _leaves(node.target)}
    return set()


def _leaves(target: ast.expr) -> Iterator[ast.Name]:
    if isinstance(target, ast.Name):
        yield target
    elif isinstance(target, (ast.Tuple, ast.List)):
        for item in target.elts:
            yield from _leaves(item)


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    if isinstance(node, (ast.If, ast.For, ast.While)):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.With):
        yield node.body
    elif isinstance(node, ast.Try):
        yield from (node.body, *(handler.body for handler in node.handlers))
        yield from (node.orelse, node.finalbody)


def _fact(node: ast.stmt, name: str) -> str:
    if isinstance(node, _FUNCTIONS):
        return _function_fact(node)
    if isinstance(node, ast.ClassDef):
        return _class_fact(node)
    if isinstance(node, ast.ImportFrom):
        alias = next(a for a in node.names if (a.asname or a.name) == name)
        return f"import {'.' * node.level}{node.module or ''}:{alias.name}"
    if isinstance(node, ast.Import):
        return f"import {name}"
    return "value"


def _function_fact(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    kinds = [text for text in map(ast.unparse, node.decorator_list) if _is_descriptor(text)]
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return " ".join([*kinds, f"{word}({ast.unparse(_bare(node.args))})"])


def _is_descriptor(decorator: str) -> bool:
    return decorator in _DESCRIPTORS or decorator.endswith((".setter", ".getter", ".deleter"))


def _bare(arguments: ast.arguments) -> ast.arguments:
    # Annotations change often and break nothing.
    bare = copy.deepcopy(arguments)
    for node in ast.walk(bare):
        if isinstance(node, ast.arg):
            node.annotation = None
    return bare


def _class_fact(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in (*node.bases, *node.keywords))
    fact = f"class({bases})"
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fact += f" fields({', '.join(_fields(node))})"
    return fact


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
