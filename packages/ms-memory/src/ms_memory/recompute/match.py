"""Which modules a plan means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

from ..errors import refuse

Plan = str | Sequence[str] | Callable[[str, nn.Module], bool]
Layers = None | int | slice | Callable[[int], bool]


def matched(model: nn.Module, plan: Plan) -> list[tuple[str, nn.Module]]:
    """Return the modules that a plan means, in the model's order.

    Args:
        model: whose modules.
        plan: names with wildcards as in `fnmatch`, or a function of name and module.

    Raises:
        MemoryFeatureError: E-M22, a name or the function matches none.
    """
    named = [(name, module) for name, module in model.named_modules() if name]
    if callable(plan):
        found = [(name, module) for name, module in named if plan(name, module)]
        if not found:
            refuse("E-M22", "the function returned False for all modules", "let it match some")
        return found
    patterns = [plan] if isinstance(plan, str) else list(plan)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            refuse("E-M22", repr(pattern), near([name for name, _ in named], pattern))
    return [(n, m) for n, m in named if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def near(names: Sequence[str], pattern: str) -> str:
    """Return advice that lists names like a pattern that matched none."""
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
    return f"names like it: {', '.join(close or names[:5])}"


def layer_index(model: nn.Module, path: str) -> int | None:
    """Return the place of a module in the outermost `ModuleList` above it; None: no such list."""
    at = model
    for part in path.split(".") if path else ():
        if isinstance(at, nn.ModuleList):
            return int(part)
        at = getattr(at, part)
    return None


def chosen(model: nn.Module, paths: Sequence[str], layers: Layers) -> list[str]:
    """Return the paths that lie in some layers.

    Args:
        model: whose paths.
        paths: of the candidates; those in no `ModuleList` count as layers in their order.
        layers: None for all, the first so many, a slice of indices, or a function of the index.

    Raises:
        MemoryFeatureError: E-M22, none lies in these layers.
        ValueError: a negative or too large number of layers.
    """
    index = {p: _or(layer_index(model, p), i) for i, p in enumerate(paths)}
    every = sorted(set(index.values()))
    if isinstance(layers, int):
        if not 0 <= layers <= len(every):
            raise ValueError(f"layers: got {layers}, need 0 to {len(every)}")
        wanted = set(every[:layers])
    elif isinstance(layers, slice):
        wanted = set(range(every[-1] + 1)[layers])
    else:
        wanted = {i for i in every if layers is None or layers(i)}
    found = [p for p in paths if index[p] in wanted]
    if not found and layers != 0:
        refuse("E-M22", f"layers {layers}", f"there are layers {every}")
    return found


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
