"""Which patches cannot live together, decided from their records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from mindspeed.patching.records import Feature, Patch

_SETTERS = ("replace", "set", "add")


@dataclass(frozen=True)
class Claim:
    """One patch and the feature that brings it.

    Attributes:
        feature: who.
        patch: what.
        asked_by: the flags that made the feature active, for messages.
    """

    feature: Feature
    patch: Patch
    asked_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = " ".join(self.asked_by) or f"always on from level {self.feature.level}"
        return f"{self.feature.name} ({how})"


def conflicts(claims: Sequence[Claim]) -> Iterator[str]:
    """One sentence for every pair of patches that cannot both be applied."""
    for first, second in combinations(claims, 2):
        for check in _CHECKS:
            if text := check(first, second):
                yield text
                break


def _stubbed(first: Claim, second: Claim) -> str | None:
    for stub, other in ((first, second), (second, first)):
        inside = f"{other.patch.module}.".startswith(f"{stub.patch.target}.")
        if stub.patch.kind == "stub_module" and inside:
            return (
                f"{stub} stubs the module {stub.patch.target}, and {other} patches"
                f" {other.patch.target} in it; give one of the two a 'when' that excludes the other"
            )
    return None


def _two_setters(first: Claim, second: Claim) -> str | None:
    kinds = (first.patch.kind, second.patch.kind)
    if first.patch.target != second.patch.target or not all(kind in _SETTERS for kind in kinds):
        return None
    return (
        f"{first} and {second} both want to {' and '.join(dict.fromkeys(kinds))}"
        f" {first.patch.target}; only one of them can: drop one of the two, or turn one patch"
        " into a 'wrap' with its own order"
    )


def _order_unclear(first: Claim, second: Claim) -> str | None:
    if first.patch.target != second.patch.target or first.feature.name == second.feature.name:
        return None
    if first.patch.order == second.patch.order:
        return (
            f"{first} and {second} both patch {first.patch.target} with order"
            f" {first.patch.order}; which one is inside? Give them different orders"
        )
    setter = next((c for c in (first, second) if c.patch.kind in _SETTERS), None)
    if setter is not None and setter.patch.order != min(first.patch.order, second.patch.order):
        return (
            f"{first} and {second} both patch {first.patch.target}, and the one that sets it has"
            f" the higher order {setter.patch.order}: it would undo the other; lower its order"
        )
    return None


def _class_and_member(first: Claim, second: Claim) -> str | None:
    for whole, part in ((first, second), (second, first)):
        if whole.patch.kind in _SETTERS and part.patch.target.startswith(whole.patch.target + "."):
            return (
                f"{whole} replaces {whole.patch.target}, and {part} patches its member"
                f" {part.patch.target}: the change would land on an object that is gone; drop one"
                " of the two"
            )
    return None


_CHECKS: tuple[Callable[[Claim, Claim], str | None], ...] = (
    _stubbed,
    _two_setters,
    _order_unclear,
    _class_and_member,
)
