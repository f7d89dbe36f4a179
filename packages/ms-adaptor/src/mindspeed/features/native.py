"""Megatron's own flags and configuration names, as a table, so that plans need no Megatron.

The table holds names, kinds and defaults: those of 0.16.1, and the flags that only 0.14 has.
`rows_from_parser` makes its rows from a live parser of Megatron-LM.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

TABLE = Path(__file__).with_name("native.json")

_SIMPLE = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class NativeFlag:
    """One flag of Megatron's parser.

    Attributes:
        names: every spelling.
        dest: attribute name.
        type: `int`, `float`, `str`, `switch`, `inverse`, `boolean`, or `other`.
        default: where it is a plain constant, else `None`.
        nargs: as in argparse.
        choices: allowed values; empty means any.
        versions: range of megatron-core that has it; empty means every supported version.
    """

    names: tuple[str, ...]
    dest: str
    type: str
    default: Any = None
    nargs: str | int | None = None
    choices: tuple[Any, ...] = ()
    versions: str = ""


@lru_cache(maxsize=1)
def _table() -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return data


@lru_cache(maxsize=1)
def native_flags() -> tuple[NativeFlag, ...]:
    """Every flag of Megatron-LM, sorted by name."""
    return tuple(
        NativeFlag(
            **{**row, "names": tuple(row["names"]), "choices": tuple(row.get("choices", ()))}
        )
        for row in _table()["flags"]
    )


@lru_cache(maxsize=1)
def native_defaults() -> Mapping[str, Any]:
    """Default of every name that Megatron's arguments or configuration objects hold."""
    values = dict(_table()["names"])
    values.update((flag.dest, flag.default) for flag in native_flags())
    return MappingProxyType(values)


def add_native(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's flags to a parser, for reading its command lines without Megatron."""
    for flag in native_flags():
        options: dict[str, Any] = {"dest": flag.dest, "default": flag.default}
        if flag.type in ("switch", "inverse"):
            options["action"] = "store_true" if flag.type == "switch" else "store_false"
        elif flag.type == "boolean":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=_SIMPLE.get(flag.type, _guess), nargs=flag.nargs)
            if flag.choices and None not in flag.choices:
                options["choices"] = flag.choices
        names = flag.names[:1] if flag.type == "boolean" else flag.names
        parser.add_argument(*names, **options)


def _guess(text: str) -> Any:
    """A number where the text is one, else the text: for flags with a parser of their own."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float)) else text


def rows_from_parser(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """The rows of the table for a live parser of Megatron-LM."""
    rows = []
    for action in parser._actions:
        if action.option_strings and not isinstance(action, argparse._HelpAction):
            rows.append(_row(action))
    return sorted(rows, key=lambda row: str(row["names"][0]))


def _row(action: argparse.Action) -> dict[str, Any]:
    row: dict[str, Any] = {
        "names": list(action.option_strings),
        "dest": action.dest,
        "type": _type_name(action),
        "default": _plain(action.default),
    }
    if action.nargs not in (None, 0):
        row["nargs"] = action.nargs
    if action.choices:
        row["choices"] = [_plain(choice) for choice in action.choices]
    return row


def _type_name(action: argparse.Action) -> str:
    kinds = {
        argparse._StoreTrueAction: "switch",
        argparse._StoreFalseAction: "inverse",
        argparse.BooleanOptionalAction: "boolean",
    }
    if type(action) in kinds:
        return kinds[type(action)]
    name = "str" if action.type is None else getattr(action.type, "__name__", "other")
    return name if name in _SIMPLE else "other"


def _plain(value: Any) -> Any:
    if isinstance(value, (int, float, str, list, type(None))) and not hasattr(value, "name"):
        return value
    return getattr(value, "name", None)
