"""Which lines of a module's functions ran: a tracer that looks at chosen files only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


@contextmanager
def lines_run(files: set[str]) -> Iterator[dict[str, set[int]]]:
    """Yield a table that fills with the lines run in these files, by this thread."""
    seen: dict[str, set[int]] = {name: set() for name in files}

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            seen[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def begin(frame: FrameType, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(begin)
    try:
        yield seen
    finally:
        sys.settrace(before)


def function_lines(file: str) -> set[int]:
    """Return the lines of all function bodies of a file that have code."""
    code = compile(Path(file).read_text(encoding="utf-8"), file, "exec")
    found: set[int] = set()
    for function in _functions(code):
        lines = {line for _, _, line in function.co_lines() if line is not None}
        found |= lines - {function.co_firstlineno}
    return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            # A class body runs at import; its methods are functions of their own.
            if not constant.co_name[0].isupper():
                yield constant
            yield from _functions(constant)
