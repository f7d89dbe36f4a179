"""Optimization levels, and the packages that each of them pulls in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

LEVELS = (0, 1, 2)
DEFAULT_LEVEL = 2

MEANING = {
    0: "Megatron runs on this device, unchanged in its numbers",
    1: "fused operators",
    2: "parallelism, memory and mixture-of-experts features",
}

# Extra of the `mindspeed` distribution -> distributions that it installs.
EXTRAS: dict[str, tuple[str, ...]] = {
    "l1": ("ms-ops",),
    "l2": ("ms-ops", "ms-parallel", "ms-memory", "ms-moe"),
    "profile": ("ms-profile",),
}
# Distributions that exist so far; a level asks for no package that nobody can install.
RELEASED = ("ms-memory", "ms-ops", "ms-parallel", "ms-profile")


def import_name(distribution: str) -> str:
    """The import name of one of our distributions."""
    return distribution.replace("-", "_")


def is_installed(distribution: str) -> bool:
    """Whether a distribution of ours can be imported; it is not imported."""
    return importlib.util.find_spec(import_name(distribution)) is not None


def missing(distributions: Iterable[str]) -> list[str]:
    """The distributions that are not installed, in the given order."""
    return [name for name in distributions if not is_installed(name)]


def extra_for(distribution: str) -> str:
    """What to install to get a distribution: the smallest extra that holds it."""
    for extra, members in EXTRAS.items():
        if distribution in members:
            return f"mindspeed[{extra}]"
    return distribution


def needed_for(level: int) -> tuple[str, ...]:
    """Distributions that a level needs.

    Raises:
        ValueError: no such level.
    """
    check_level(level)
    wanted = EXTRAS[f"l{level}"] if level else ()
    return tuple(name for name in wanted if name in RELEASED)


def check_level(level: int) -> int:
    """Return `level`, or raise `ValueError` naming the levels that exist."""
    if level not in LEVELS or isinstance(level, bool):
        raise ValueError(f"optimization level is {level!r}; it must be 0, 1 or 2")
    return level


def default_level() -> int:
    """The highest level whose packages are installed."""
    return max(level for level in LEVELS if not missing(needed_for(level)))
