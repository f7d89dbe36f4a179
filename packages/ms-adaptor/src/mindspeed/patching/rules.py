"""Evaluation of a feature's rules against one configuration."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from mindspeed.patching.expr import ExprError, parse
from mindspeed.patching.records import Feature, Rule


def broken_rules(feature: Feature, values: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for every rule of the feature that the configuration breaks."""
    for rule in feature.rules:
        try:
            broken = is_broken(rule, values)
        except ExprError as error:
            yield f"{feature.name}: {rule.text} (cannot be checked: {error})"
            continue
        if broken:
            yield _sentence(feature, rule, values)


def is_broken(rule: Rule, values: Mapping[str, Any]) -> bool:
    """Whether the values break one rule.

    Raises:
        ExprError: an expression has no value, or `divides` is given something else than integers.
    """
    left = parse(rule.left).evaluate(values)
    if rule.kind == "range":
        return left is not None and not parse(rule.right).evaluate(values)
    if rule.kind != "divides" and not left:
        return False
    right = parse(rule.right).evaluate(values)
    if rule.kind == "divides":
        return _does_not_divide(rule, left, right)
    return bool(right) if rule.kind == "forbids" else not right


def _does_not_divide(rule: Rule, left: Any, right: Any) -> bool:
    for text, value in ((rule.left, left), (rule.right, right)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ExprError(f"{text} is {value!r}, not an integer")
    if left == 0:
        raise ExprError(f"{rule.left} is 0")
    return bool(right % left)


def _sentence(feature: Feature, rule: Rule, values: Mapping[str, Any]) -> str:
    names = sorted(parse(rule.left).names | parse(rule.right).names)
    given = ", ".join(f"{name}={values[name]!r}" for name in names)
    advice = f" {rule.suggestion}" if rule.suggestion else ""
    if rule.hint is not None:
        module, _, name = rule.hint.partition(":")
        advice += f" {getattr(importlib.import_module(module), name)(values)}"
    return f"{feature.name}: {rule.text} ({given}).{advice}"
