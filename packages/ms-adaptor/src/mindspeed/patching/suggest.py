"""Nearest names for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first."""
    return difflib.get_close_matches(name, sorted(known), n=count, cutoff=0.6)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause such as `"; did you mean 'a' or 'b'?"`, or nothing if no name is near."""
    names = [repr(item) for item in nearest_names(name, known)]
    if not names:
        return ""
    return f"; did you mean {' or '.join(names)}?"
