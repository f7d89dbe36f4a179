"""Counting calls of a patched function, by a plain function around it.

A plain function and not a proxy object: it can be compiled, pickled by name and deep-copied.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any


class Tally:
    """Number of eager calls, and whether a compiler has traced the function."""

    __slots__ = ("count", "traced")

    def __init__(self) -> None:
        self.count = 0
        self.traced = False

    @property
    def called(self) -> bool:
        """Whether the function has run, or runs inside a compiled graph."""
        return self.traced or self.count > 0


def can_count(function: object) -> bool:
    """Whether `counted` keeps the meaning of a callable: true for plain, not async, functions."""
    return isinstance(function, FunctionType) and not (
        inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    )


def counted(function: Callable[..., Any], like: object, tally: Tally) -> Callable[..., Any]:
    """`function` with its calls counted, named like the object whose place it takes.

    The name matters: a function is pickled as its module and qualified name, and under the
    original's name that finds the patched function here and the original elsewhere.
    """
    named = like if isinstance(like, FunctionType) else function
    counting = _compilable(function, tally) if "torch" in sys.modules else _plain(function, tally)
    functools.update_wrapper(counting, named)
    counting.__wrapped__ = function  # type: ignore[attr-defined]
    return counting


def _plain(function: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        tally.count += 1
        return function(*args, **kwargs)

    return counting


def _compilable(function: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    from torch.compiler import is_compiling

    def note_trace() -> bool:
        tally.traced = True
        return True

    # The mark of torch.compiler.assume_constant_result, which would import the whole compiler
    # (2 s) to set it: the function runs once while tracing and is no part of the graph.
    note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def counting(*args: Any, **kwargs: Any) -> Any:
        # A counter inside a graph would be guarded on, and so recompiled for every call.
        if is_compiling():
            note_trace()
        else:
            tally.count += 1
        return function(*args, **kwargs)

    return counting
