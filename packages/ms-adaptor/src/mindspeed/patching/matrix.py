"""Every pair of features that cannot be combined, found from the records alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from mindspeed.patching.conflicts import Claim, conflicts
from mindspeed.patching.detect import DEVICES
from mindspeed.patching.expr import parse
from mindspeed.patching.records import Feature
from mindspeed.patching.table import CONTEXT_NAMES, Table


@dataclass(frozen=True)
class Pair:
    """Two features that exclude each other.

    Attributes:
        first: name of a feature.
        second: name of another.
        because: one sentence each.
    """

    first: str
    second: str
    because: tuple[str, ...]


def pair_matrix(table: Table) -> list[Pair]:
    """Pairs with two patches that collide, or with a rule by which one forbids the other.

    A patch counts on every device where its condition may hold; conditions on the configuration
    are taken as true, so a pair listed here may still be fine in some configuration.
    """
    found = []
    for first, second in combinations(table.features, 2):
        reasons = [*_collisions(first, second), *_forbidden(first, second)]
        if reasons:
            found.append(Pair(first.name, second.name, tuple(dict.fromkeys(reasons))))
    return found


def _collisions(first: Feature, second: Feature) -> Iterator[str]:
    for device in DEVICES:
        mine = [*_claims(first, device), *_claims(second, device)]
        names = (first.name, second.name)
        for one, other in combinations(mine, 2):
            if {one.feature.name, other.feature.name} == set(names):
                yield from conflicts([one, other])


def _claims(feature: Feature, device: str) -> Iterator[Claim]:
    flags = tuple(flag.name for flag in feature.flags)
    for patch in feature.patches:
        if patch.when is None or _may_hold(patch.when, device):
            yield Claim(feature, patch, flags)


def _may_hold(text: str, device: str) -> bool:
    expression = parse(text)
    if expression.names - {"device"}:
        return True
    return bool(expression.evaluate({"device": device}))


def _forbidden(first: Feature, second: Feature) -> Iterator[str]:
    for owner, other in ((first, second), (second, first)):
        theirs = {flag.attribute for flag in other.flags}
        for rule in owner.rules:
            names = parse(rule.right).names - set(CONTEXT_NAMES)
            if rule.kind == "forbids" and names & theirs:
                yield f"{owner.name}: {rule.text}"
