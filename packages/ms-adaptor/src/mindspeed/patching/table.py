"""Checks over a whole feature table, done once when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed.patching.expr import ExprError, parse
from mindspeed.patching.records import Feature, Flag

# Names that every expression may use besides the configuration's.
CONTEXT_NAMES = ("device", "level")


class TableError(ValueError):
    """The feature table contradicts itself; every fault is listed."""


@dataclass(frozen=True)
class Table:
    """A checked feature table.

    Attributes:
        features: in display order.
        flags: flags that are known but belong to no feature here (planned, dropped, native).
        native: default of every configuration name of Megatron's own.
        defaults: default of every name that a configuration may hold, ours and Megatron's.

    Raises:
        TableError: two features with one name or one flag, an undeclared name in an expression.
    """

    features: tuple[Feature, ...]
    flags: tuple[Flag, ...] = ()
    native: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        known = {flag.attribute: flag.default for flag in self.flags}
        # A feature that acts on a flag of Megatron's has a default of its own for it.
        acting = {f.attribute: f.default for feature in self.features for f in feature.flags}
        object.__setattr__(self, "defaults", {**known, **self.native, **acting})
        if faults := [*self._doubles(), *self._undeclared()]:
            raise TableError("feature table:\n" + "\n".join(f"  {fault}" for fault in faults))

    def _doubles(self) -> Iterator[str]:
        names: set[str] = set()
        for feature in self.features:
            if feature.name in names:
                yield f"two features are named {feature.name!r}"
            names.add(feature.name)
        owner: dict[str, str] = {}
        for feature in self.features:
            for flag in feature.flags:
                for spelling in (flag.name, *flag.aliases):
                    if spelling in owner:
                        yield f"{owner[spelling]} and {feature.name} both declare {spelling}"
                    owner[spelling] = feature.name

    def _undeclared(self) -> Iterator[str]:
        declared = frozenset(self.defaults) | frozenset(CONTEXT_NAMES)
        for feature in self.features:
            for choice in feature.choices:
                if choice.attribute not in self.native:
                    yield f"{feature.name}: {choice.flag} is no flag of Megatron's"
            for text in expressions(feature):
                try:
                    parse(text).check(declared)
                except ExprError as error:
                    yield f"{feature.name}: {error}"

    def feature(self, name: str) -> Feature:
        """The feature of that name; `KeyError` if there is none."""
        return next(feature for feature in self.features if feature.name == name)


def expressions(feature: Feature) -> Iterator[str]:
    """Every expression text of a feature."""
    if feature.when is not None:
        yield feature.when
    for rule in feature.rules:
        yield from (rule.left, rule.right)
    yield from (patch.when for patch in feature.patches if patch.when is not None)


def make_table(features: Sequence[Feature], native: Mapping[str, Any] | None = None) -> Table:
    """A table of the given features alone, for tests and for embedders."""
    return Table(tuple(features), (), native or {})
