"""The five records that describe everything this project changes in Megatron."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from packaging.specifiers import InvalidSpecifier, SpecifierSet

PatchKind = Literal["replace", "wrap", "set", "add", "stub_module"]
FlagStatus = Literal["kept", "native", "planned", "dropped"]
FlagType = Literal["int", "float", "str", "switch", "inverse", "int+"]
RuleKind = Literal["requires", "forbids", "implies", "divides", "range"]
Level = Literal[0, 1, 2]

SUPPORTED_MEGATRON = ">=0.14,<0.17"

_FLAG_NAME = re.compile(r"--[a-z0-9]+(-[a-z0-9]+)*")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in text.split("."))


def _is_reference(text: str) -> bool:
    module, colon, path = text.partition(":")
    return bool(colon) and _is_dotted(module) and _is_dotted(path)


def _check_choice(owner: str, field: str, value: Any, allowed: Iterable[Any]) -> None:
    names = ", ".join(repr(item) for item in allowed)
    _require(value in tuple(allowed), f"{owner}: {field} is {value!r}; it must be one of {names}")


def _check_text(owner: str, field: str, value: Any) -> None:
    filled = isinstance(value, str) and bool(value.strip())
    _require(filled, f"{owner}: {field} must be a sentence, got {value!r}")


def _check_tuple(owner: str, field: str, value: Any, kind: type) -> None:
    good = isinstance(value, tuple) and all(isinstance(item, kind) for item in value)
    _require(good, f"{owner}: {field} must be a tuple of {kind.__name__}, got {value!r}")


@dataclass(frozen=True)
class Patch:
    """One change of one name in Megatron.

    Args:
        target: `"module:attr.path"`, the place where the name is *defined*; for `stub_module` only
            `"module"`, a leaf module under `megatron`.
        kind: `replace` puts `value` in place of a function, class or descriptor that exists;
            `wrap` calls `value(original)` and installs the plain function that it returns;
            `set` gives a module or class variable the object `value`;
            `add` creates a name that must not exist yet;
            `stub_module` answers imports of `target` with the module that `value(name)` builds.
        value: `"pkg.module:obj"`, imported only when the patch takes effect.
        reason: one sentence that says why no extension point of Megatron fits.
        when: expression over the configuration, `device` and `level`; `None` means always.
        versions: the range of megatron-core versions that this patch was checked against.
        probe: `"pkg.module:obj"`, called as `probe(module)` once the target module has been
            imported: true when the defect is there, false when the patch is not needed. For
            `stub_module` it is called as `probe(None)` before anything is imported.
        order: place among the patches of one target, lowest first (innermost).

    Raises:
        ValueError: a field is malformed; the message names the patch and the field.
    """

    target: str
    kind: PatchKind
    value: str
    reason: str
    when: str | None = None
    versions: str = SUPPORTED_MEGATRON
    probe: str | None = None
    order: int = 0

    def __post_init__(self) -> None:
        name = f"patch {self.target!r}"
        _check_choice(name, "kind", self.kind, get_args(PatchKind))
        if self.kind == "stub_module":
            form, good = "'package.module'", _is_dotted(self.target)
        else:
            form, good = "'package.module:attr.path'", _is_reference(self.target)
        _require(good, f"{name}: target must look like {form}")
        inside = self.target.split(":")[0].split(".")[0]
        _require(
            inside != "torch", f"{name}: targets inside torch are refused; torch stays unchanged"
        )
        for field, text in (("value", self.value), ("probe", self.probe)):
            if text is not None or field == "value":
                good = isinstance(text, str) and _is_reference(text)
                _require(good, f"{name}: {field} must look like 'pkg.module:obj', got {text!r}")
        _check_text(name, "reason", self.reason)
        _require(isinstance(self.order, int), f"{name}: order must be an int, got {self.order!r}")
        try:
            SpecifierSet(self.versions)
        except InvalidSpecifier as error:
            raise ValueError(
                f"{name}: versions {self.versions!r} is not a version range such as"
                f" {SUPPORTED_MEGATRON!r}"
            ) from error

    @property
    def module(self) -> str:
        """Dotted name of the module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> str:
        """Attribute path inside the module; empty for `stub_module`."""
        return self.target.partition(":")[2]


@dataclass(frozen=True)
class Flag:
    """One command-line flag, with its meaning and its fate.

    Args:
        name: the spelling on the command line, `--sparse-mode`.
        dest: attribute name in the parsed configuration; `None` derives it from `name`.
        type: `int`, `float`, `str`, `switch` (stores true), `inverse` (stores false), or `int+`
            (one or more integers).
        default: the value when the flag is not given.
        choices: allowed values; empty means any.
        help: what the flag means, in one sentence.
        status: `kept` acts; `native` belongs to Megatron itself (see `maps_to`); `planned` is an
            error that says so; `dropped` is an error that gives `reason`.
        maps_to: Megatron's own flag with this meaning, for `native`.
        reason: why a flag is dropped or renamed, and what to use instead.
        aliases: other spellings that mean the same.

    Raises:
        ValueError: a field is malformed; the message names the flag and the field.
    """

    name: str
    dest: str | None = None
    type: FlagType = "switch"
    default: Any = None
    choices: tuple[Any, ...] = ()
    help: str = ""
    status: FlagStatus = "kept"
    maps_to: str | None = None
    reason: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        name = f"flag {self.name!r}"
        for spelling in (self.name, *self.aliases):
            good = isinstance(spelling, str) and bool(_FLAG_NAME.fullmatch(spelling))
            _require(good, f"{name}: {spelling!r} must look like '--lower-case-words'")
        if self.dest is None:
            object.__setattr__(self, "dest", self.name[2:].replace("-", "_"))
        good = isinstance(self.dest, str) and self.dest.isidentifier()
        _require(good, f"{name}: dest must be an identifier, got {self.dest!r}")
        _check_choice(name, "type", self.type, get_args(FlagType))
        _check_choice(name, "status", self.status, get_args(FlagStatus))
        _check_text(name, "help", self.help)
        _require(isinstance(self.choices, tuple), f"{name}: choices must be a tuple")
        if self.default is None and self.type in ("switch", "inverse"):
            object.__setattr__(self, "default", self.type == "inverse")
        if self.choices and self.default is not None:
            _check_choice(name, "default", self.default, self.choices)
        if self.status == "native":
            _require(bool(self.maps_to), f"{name}: a native flag must say what it maps_to")
        if self.status == "dropped":
            _check_text(name, "reason", self.reason)

    @property
    def attribute(self) -> str:
        """Attribute name in the parsed configuration (`dest`, never `None`)."""
        assert self.dest is not None
        return self.dest


@dataclass(frozen=True)
class Choice:
    """One more value that a flag of Megatron's takes.

    Args:
        flag: the flag, `--position-embedding-type`.
        value: the value.

    Raises:
        ValueError: a field is malformed.
    """

    flag: str
    value: str

    def __post_init__(self) -> None:
        good = isinstance(self.flag, str) and bool(_FLAG_NAME.fullmatch(self.flag))
        _require(good, f"choice: flag {self.flag!r} must look like '--lower-case-words'")
        _check_text(f"choice of {self.flag}", "value", self.value)

    @property
    def attribute(self) -> str:
        """Attribute name of the flag in the parsed configuration."""
        return self.flag[2:].replace("-", "_")

    def __str__(self) -> str:
        return f"{self.flag} {self.value}"


@dataclass(frozen=True)
class Rule:
    """One condition on the configuration, evaluated when the plan is made.

    `left` and `right` are expressions (see `mindspeed.patching.expr`). The rule is broken when:

    * `requires`: `left` is true and `right` is false;
    * `forbids`: `left` and `right` are both true;
    * `implies`: as `requires`, for a consequence and not a choice of the user;
    * `divides`: the number `right` is not a multiple of the number `left`;
    * `range`: `left` is a number and the condition `right` on it is false.

    Args:
        kind: one of the five above.
        left: expression.
        right: expression.
        text: what is wrong, in one sentence.
        suggestion: what to do about it.
        hint: `"pkg.module:obj"`, called as `hint(values)` with the configuration when the rule is
            broken; returns a sentence with what would be legal there.

    Raises:
        ValueError: a field is malformed.
    """

    kind: RuleKind
    left: str
    right: str
    text: str
    suggestion: str = ""
    hint: str | None = None

    def __post_init__(self) -> None:
        name = f"rule {self.left!r} {self.kind} {self.right!r}"
        _check_choice(name, "kind", self.kind, get_args(RuleKind))
        for field in ("left", "right", "text"):
            _check_text(name, field, getattr(self, field))
        if self.hint is not None:
            good = isinstance(self.hint, str) and _is_reference(self.hint)
            _require(good, f"{name}: hint must look like 'pkg.module:obj', got {self.hint!r}")


@dataclass(frozen=True)
class Feature:
    """Everything that one feature brings to Megatron.

    Args:
        name: dotted lower-case name, `level0.norm`; unique.
        level: optimization level that it belongs to: 0, 1 or 2.
        flags: its command-line flags.
        rules: conditions on the configuration while it is active.
        patches: its changes to Megatron.
        packages: distributions that it needs, `("ms-ops",)`.
        doc: what it does, in one sentence.
        advise: `"pkg.module:obj"`, called as `advise(config)`; says when it pays and when it costs.
        page: its page under `docs/`.
        when: expression that makes it active; `None` means: always from its level on if it has no
            flags and no choices, else as soon as one of them is given.
        choices: values that it adds to flags of Megatron's.

    Raises:
        ValueError: a field is malformed.
    """

    name: str
    level: Level
    flags: tuple[Flag, ...] = ()
    rules: tuple[Rule, ...] = ()
    patches: tuple[Patch, ...] = ()
    packages: tuple[str, ...] = ()
    doc: str = ""
    advise: str | None = None
    page: str | None = None
    when: str | None = None
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        name = f"feature {self.name!r}"
        _require(_is_dotted(self.name), f"{name}: the name must be dotted identifiers")
        _check_choice(name, "level", self.level, get_args(Level))
        for field, kind in (
            ("flags", Flag),
            ("rules", Rule),
            ("patches", Patch),
            ("choices", Choice),
        ):
            _check_tuple(name, field, getattr(self, field), kind)
        _check_tuple(name, "packages", self.packages, str)
        _check_text(name, "doc", self.doc)
        if self.advise is not None:
            good = isinstance(self.advise, str) and _is_reference(self.advise)
            _require(good, f"{name}: advise must look like 'pkg.module:obj', got {self.advise!r}")
