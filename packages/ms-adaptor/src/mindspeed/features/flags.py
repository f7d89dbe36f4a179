"""The 168 flags of MindSpeed: one table, and what becomes of each flag on a command line."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from mindspeed import levels
from mindspeed.features.native import native_defaults
from mindspeed.patching.records import Feature, Flag
from mindspeed.patching.suggest import nearest

TABLE = Path(__file__).with_name("flags.json")

_TYPES = {"int": int, "float": float, "str": str, "int+": int}


@dataclass(frozen=True)
class FlagRow:
    """One row of the table.

    Attributes:
        flag: the record.
        feature: name of the feature that it belongs to, built or not.
        level: optimization level of that feature.
        package: distribution that holds, or will hold, the feature.
    """

    flag: Flag
    feature: str
    level: int
    package: str


@lru_cache(maxsize=1)
def flag_rows() -> tuple[FlagRow, ...]:
    """Every row, in the order of the table."""
    return tuple(map(_row, json.loads(TABLE.read_text(encoding="utf-8"))))


def _row(data: dict[str, Any]) -> FlagRow:
    feature, level, package = (data.pop(key) for key in ("feature", "level", "package"))
    for key in ("choices", "aliases"):
        data[key] = tuple(data.get(key, ()))
    if isinstance(data.get("default"), list):
        # argparse collects values into a list, so that a tuple tells the default from those.
        data["default"] = tuple(data["default"])
    return FlagRow(Flag(**data), feature, level, package)


def kept_flags(feature: str) -> tuple[Flag, ...]:
    """The table's flags that act and belong to a feature."""
    rows = flag_rows()
    return tuple(r.flag for r in rows if r.feature == feature and r.flag.status == "kept")


def unserved_flags() -> tuple[Flag, ...]:
    """Planned and dropped flags whose attribute Megatron does not use for itself."""
    taken = native_defaults()
    flags = (row.flag for row in flag_rows())
    return tuple(
        f for f in flags if f.status in ("planned", "dropped") and f.attribute not in taken
    )


def refusal(flag: Flag) -> str:
    """Why a planned or dropped flag is refused, and what to do."""
    if flag.status == "planned":
        row = next(row for row in flag_rows() if row.flag is flag)
        return (
            f"{flag.name} is planned but not built yet (feature {row.feature}, {row.package});"
            " leave it out for now"
        )
    return f"{flag.name} is not supported: {flag.reason}"


class _Refuse(argparse.Action):
    """A planned or dropped flag: an error that says so."""

    def __init__(self, flag: Flag, **options: Any) -> None:
        self.flag = flag
        super().__init__(**options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        _fail(parser, refusal(self.flag))


class _Alias(argparse.Action):
    """Another spelling of a flag that the parser has: acts as that one, with a warning."""

    def __init__(self, action: argparse.Action, **options: Any) -> None:
        self.action = action
        options.update(nargs=action.nargs, type=action.type, choices=action.choices)
        super().__init__(**options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = self.action.option_strings[0]
        warnings.warn(f"{option_string} is Megatron's {name}; taken as that", stacklevel=2)
        self.action(parser, namespace, values, name)


def add_flags(
    parser: argparse.ArgumentParser, features: Iterable[Feature] | None = None
) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser (or to any other).

    A flag of a built feature is added; one that Megatron has under another name becomes an alias;
    a planned or dropped one becomes an error that says so. What the parser has already stays, with
    the default of the built feature that acts on it and the values that features add to it.

    Args:
        parser: changed in place.
        features: whose flags to add; `None` means the project's own.

    Returns:
        The parser.
    """
    if features is None:
        from mindspeed.features import load_features

        features = load_features()
    features = tuple(features)
    group = parser.add_argument_group("MindSpeed")
    known = {name: action for action in parser._actions for name in action.option_strings}
    own = (flag for feature in features for flag in feature.flags)
    for flag in (*own, *(row.flag for row in flag_rows() if row.flag.status != "kept")):
        names = [name for name in (flag.name, *flag.aliases) if name not in known]
        if names:
            _add(group, names, flag, known)
        elif flag.status == "kept" and isinstance(flag.default, tuple):
            known[flag.name].default = flag.default
    _add_choices(features, known)
    _explain_unknown(parser)
    return parser


def _add_choices(features: Iterable[Feature], known: dict[str, argparse.Action]) -> None:
    for choice in (choice for feature in features for choice in feature.choices):
        action = known.get(choice.flag)
        if action is not None and action.choices and choice.value not in action.choices:
            action.choices = [*action.choices, choice.value]


def _add(
    group: argparse._ArgumentGroup, names: Sequence[str], flag: Flag, known: dict[str, Any]
) -> None:
    if flag.status == "kept":
        group.add_argument(*names, **_options(flag))
        return
    quiet = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if flag.status == "native":
        native = known.get(str(flag.maps_to))
        if native is not None:
            group._add_action(_Alias(native, option_strings=list(names), **quiet))
        return
    group._add_action(_Refuse(flag, option_strings=list(names), nargs="*", **quiet))


def _options(flag: Flag) -> dict[str, Any]:
    options: dict[str, Any] = {"dest": flag.dest, "help": flag.help, "default": flag.default}
    if flag.dest == "optimization_level":
        options["default"] = levels.default_level()
    if flag.type in ("switch", "inverse"):
        options["action"] = "store_true" if flag.type == "switch" else "store_false"
        return options
    options["type"] = _TYPES[flag.type]
    if flag.type == "int+":
        options["nargs"] = "+"
    if flag.choices:
        options["choices"] = flag.choices
    return options


def _fail(parser: argparse.ArgumentParser, text: str) -> NoReturn:
    # Without the usage lines: those of Megatron fill several screens.
    parser.exit(2, f"{parser.prog}: error: {text}\n")


def _explain_unknown(parser: argparse.ArgumentParser) -> None:
    original = parser.error

    def error(message: str) -> NoReturn:
        head, colon, rest = message.partition("unrecognized arguments: ")
        if head or not colon:
            original(message)
        _fail(parser, unknown_flags(parser, rest.split()))

    parser.error = error  # type: ignore[method-assign]


def unknown_flags(parser: argparse.ArgumentParser, tokens: Sequence[str]) -> str:
    """One sentence for each unknown flag, with the nearest names that the parser has."""
    known = [name for action in parser._actions for name in action.option_strings]
    flags = [token.partition("=")[0] for token in tokens if token.startswith("-")]
    wrong = [f"unknown flag {flag}{nearest(flag, known)}" for flag in flags]
    return "; ".join(wrong) or f"arguments that belong to no flag: {' '.join(tokens)}"
