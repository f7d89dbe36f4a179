"""Break the code on purpose, to know that a check would notice.

    DROP_SCALE = Mutation("dropped scale", "ms_ops.norm.reference:rms_norm", "* weight", "")

    def test_a_dropped_scale_is_caught():
        assert_caught(DROP_SCALE, check_rms_norm)

The body of the function is recompiled from its changed source and put into the living function
object, so that copies taken by `from module import name` are changed as well.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType


@dataclass(frozen=True)
class Mutation:
    """A textual change to one function: `old`, which must occur `count` times, becomes `new`.

    Attributes:
        name: What is broken, for the message.
        target: "module:qualified.name" of a Python function or method.
        old: Text in the function's source.
        new: What stands there instead.
        count: How often `old` must occur; all are replaced.
    """

    name: str
    target: str
    old: str
    new: str
    count: int = 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Hold the mutation for the length of a `with` block.

        Raises:
            ValueError: `old` does not occur `count` times, so the mutation is out of date.
        """
        function = _resolve(self.target)
        mutant = self._code(function)
        original = function.__code__
        function.__code__ = mutant
        try:
            yield
        finally:
            function.__code__ = original

    def _code(self, function: FunctionType) -> CodeType:
        source = textwrap.dedent(inspect.getsource(function))
        found = source.count(self.old)
        if found != self.count:
            raise ValueError(
                f"mutation {self.name!r}: {self.old!r} occurs {found} times in {self.target}, "
                f"expected {self.count}"
            )
        return _compile(source.replace(self.old, self.new), function)


def assert_caught(
    mutation: Mutation,
    check: Callable[[], object],
    by: type[BaseException] | tuple[type[BaseException], ...] = AssertionError,
) -> None:
    """Assert that `check()` passes as the code stands and raises `by` under the mutation."""
    check()
    with mutation.applied():
        try:
            check()
        except by:
            return
    raise AssertionError(f"the check does not notice the mutation {mutation.name!r}")


def _resolve(target: str) -> FunctionType:
    module, _, name = target.partition(":")
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
    found = inspect.unwrap(found)  # type: ignore[arg-type]
    if not isinstance(found, FunctionType):
        raise TypeError(f"{target} is {type(found).__name__}, not a Python function")
    return found


def _compile(source: str, function: FunctionType) -> CodeType:
    """The code of the changed source, with the free variables of the living function."""
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise TypeError(f"{function.__qualname__} is not written as a def")
    definition.decorator_list = []
    names = function.__code__.co_freevars
    if names:
        # `super()` and closures need their names to be free; an enclosing def makes them so.
        lines = [f"{name} = None" for name in names]
        outer = ast.parse("def enclosing():\n    " + "\n    ".join(lines))
        outer.body[0].body.append(definition)  # type: ignore[attr-defined]
        tree = outer
    ast.increment_lineno(definition, function.__code__.co_firstlineno - definition.lineno)
    code = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec")
    for _ in range(2 if names else 1):
        code = next(c for c in code.co_consts if isinstance(c, CodeType))
    if code.co_freevars != names:
        raise ValueError(f"the mutation changes the closure of {function.__qualname__}")
    return code
