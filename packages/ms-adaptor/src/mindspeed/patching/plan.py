"""From a configuration to a plan: pure, without Megatron, with every problem listed at once."""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, Literal

from mindspeed import levels
from mindspeed.patching import fingerprints as prints
from mindspeed.patching.config import Config
from mindspeed.patching.conflicts import Claim, conflicts
from mindspeed.patching.detect import device_type
from mindspeed.patching.drift import Megatron, resolve_megatron, verdict
from mindspeed.patching.errors import PlanError
from mindspeed.patching.expr import ExprError, parse
from mindspeed.patching.records import SUPPORTED_MEGATRON, Feature, Patch
from mindspeed.patching.rules import broken_rules
from mindspeed.patching.table import Table, make_table

Status = Literal["apply", "probe", "inactive", "native", "absent", "refused"]
ACTING = ("apply", "probe", "absent")


@dataclass(frozen=True)
class Step:
    """One patch of a plan, and what becomes of it.

    Attributes:
        patch: the record.
        feature: name of the feature that brings it.
        level: optimization level of that feature.
        because: the flags, the device or the level that ask for it.
        status: `apply` will patch; `probe` will patch if the probe finds the defect; `inactive`
            its condition is false; `native` this Megatron does not need it; `absent` that part of
            Megatron is not there yet, and is checked and patched if it is imported after all;
            `refused` see the plan's problems.
        note: why the status is what it is.
        signature: the target's signature in this Megatron, where known.
    """

    patch: Patch
    feature: str
    level: int
    because: str
    status: Status
    note: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run changes in Megatron. Immutable; made by `plan`, carried out by `apply`.

    Attributes:
        level: optimization level.
        device: `cpu`, `npu` or `cuda`.
        megatron: the megatron-core version that it was made for.
        assumed: true when no Megatron was found and the newest recorded version was assumed.
        features: names of the active features.
        steps: every patch of the active features, in the order of application.
        problems: why it cannot be carried out; empty for every plan that `plan` returns.
    """

    level: int
    device: str
    megatron: str
    assumed: bool
    features: tuple[str, ...]
    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()

    @property
    def acting(self) -> tuple[Step, ...]:
        """The steps that change something, as soon as their module is imported."""
        return tuple(step for step in self.steps if step.status in ACTING)

    @property
    def digest(self) -> str:
        """Hash of the content; two plans with one digest do the same."""
        parts = [self.level, self.device, self.megatron, [asdict(s.patch) for s in self.acting]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def summary(self) -> str:
        """How many patches act, in one phrase."""
        absent = sum(step.status == "absent" for step in self.steps)
        text = f"{len(self.acting) - absent} of {len(self.steps)} patches act"
        return text + (f", {absent} if that part of Megatron is found later" if absent else "")

    def to_json(self) -> str:
        """The plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            ValueError: the text is not a plan, or was changed since it was written.
        """
        try:
            data = json.loads(text)
            digest = data.pop("digest")
            data["steps"] = tuple(
                Step(**{**step, "patch": Patch(**step["patch"])}) for step in data["steps"]
            )
            for name in ("features", "problems"):
                data[name] = tuple(data[name])
            plan = Plan(**data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this text is not a plan: {error}") from error
        if plan.digest != digest:
            raise ValueError(f"plan {digest} was changed: its content now has hash {plan.digest}")
        return plan

    def __str__(self) -> str:
        found = "assumed" if self.assumed else "installed"
        head = f"plan {self.digest}: level {self.level}, {self.device}, megatron-core"
        lines = [f"{head} {self.megatron} ({found}), {self.summary()}"]
        for step in self.steps:
            patch = step.patch
            lines.append(f"  {step.status:8} {patch.kind:7} {patch.target}  [{step.feature}]")
        lines.extend(f"  problem: {text}" for text in self.problems)
        return "\n".join(lines)


def plan(
    config: object = None,
    level: int | None = levels.DEFAULT_LEVEL,
    device: str = "auto",
    megatron: str | PathLike[str] = "auto",
    features: Sequence[Feature] | Table | None = None,
) -> Plan:
    """Decide what a run changes in Megatron; nothing is imported, nothing is changed.

    Args:
        config: the parsed arguments (namespace, mapping or object); `None` means all defaults.
        level: optimization level 0, 1 or 2; `None` takes the configuration's
            `optimization_level`, else the highest level whose packages are installed.
        device: `cpu`, `npu`, `cuda`, or `auto`.
        megatron: `auto` for the installed one, a version, or a path of a wheel or checkout.
        features: other features than the project's own.

    Returns:
        The plan, without problems.

    Raises:
        PlanError: the configuration cannot be served; lists every problem.
        ValueError: an argument is malformed.
    """
    made = draft(config, level, device, megatron, features)
    if made.problems:
        raise PlanError(made.problems)
    return made


def draft(
    config: object = None,
    level: int | None = levels.DEFAULT_LEVEL,
    device: str = "auto",
    megatron: str | PathLike[str] = "auto",
    features: Sequence[Feature] | Table | None = None,
) -> Plan:
    """As `plan`, but a plan with problems is returned and not raised."""
    table = _table(features)
    values = Config(config, table.defaults)
    chosen = levels.check_level(_level(values) if level is None else level)
    place = resolve_megatron(megatron)
    context = {"device": device_type(device), "level": chosen}
    builder = _Builder(table, values, context, place)
    return builder.build()


def _table(features: Sequence[Feature] | Table | None) -> Table:
    if isinstance(features, Table):
        return features
    if features is not None:
        return make_table(features, native_defaults())
    from mindspeed.features import load_table

    return load_table()


def native_defaults() -> Mapping[str, Any]:
    """Default of every configuration name of Megatron's own."""
    from mindspeed.features.native import native_defaults as load

    return load()


def _level(values: Config) -> int:
    given = values["optimization_level"] if values.holds("optimization_level") else None
    return levels.default_level() if given is None else int(given)


class _Builder:
    """The stages of one plan; each returns data, problems are collected on the way."""

    def __init__(
        self, table: Table, config: Config, context: dict[str, Any], megatron: Megatron
    ) -> None:
        self.table = table
        self.config = config
        self.context = context
        self.values: Mapping[str, Any] = ChainMap(context, config)  # type: ignore[arg-type]
        self.megatron = megatron
        self.problems: list[str] = []

    def build(self) -> Plan:
        self._check_unserved_flags()
        active = [feature for feature in self.table.features if self._is_active(feature)]
        for feature in active:
            self._check_packages(feature)
            self.problems.extend(broken_rules(feature, self.values))
        steps = [self._step(feature, patch) for feature in active for patch in feature.patches]
        self._check_conflicts(active, steps)
        self._check_version(steps)
        return Plan(
            level=self.context["level"],
            device=self.context["device"],
            megatron=self.megatron.version,
            assumed=self.megatron.source is None,
            features=tuple(feature.name for feature in active),
            steps=tuple(sorted(steps, key=_place)),
            problems=tuple(dict.fromkeys(self.problems)),
        )

    def _check_unserved_flags(self) -> None:
        for flag in self.table.flags:
            if flag.status in ("planned", "dropped") and self.config.gives(flag.attribute):
                from mindspeed.features.flags import refusal

                self.problems.append(refusal(flag))

    def _is_active(self, feature: Feature) -> bool:
        level, asked = self.context["level"], self._asked_by(feature)
        if feature.level > level:
            for name in asked:
                self.problems.append(
                    f"{name} ({feature.name}) belongs to optimization level {feature.level}, and"
                    f" this run asks for level {level}; give --optimization-level {feature.level}"
                    " or leave the flag out"
                )
            return False
        if feature.when is not None:
            return self._holds(feature, feature.when)
        return bool(asked) or not (feature.flags or feature.choices)

    def _holds(self, feature: Feature, condition: str) -> bool:
        try:
            return bool(parse(condition).evaluate(self.values))
        except ExprError as error:
            self.problems.append(f"{feature.name}: {error}")
            return False

    def _asked_by(self, feature: Feature) -> tuple[str, ...]:
        flags = (f.name for f in feature.flags if self.config.gives(f.attribute))
        held = (c for c in feature.choices if self.config.holds(c.attribute))
        return (*flags, *(str(c) for c in held if self.config[c.attribute] == c.value))

    def _check_packages(self, feature: Feature) -> None:
        for name in levels.missing(feature.packages):
            self.problems.append(
                f"{feature.name} needs {name}, which is not installed; run"
                f" pip install '{levels.extra_for(name)}'"
                + (f" or give --optimization-level {feature.level - 1}" if feature.level else "")
            )

    def _step(self, feature: Feature, patch: Patch) -> Step:
        because = " ".join(self._asked_by(feature)) or f"level {feature.level}"
        if patch.when is not None:
            because += f", {patch.when}"
        status: Status = "probe" if patch.probe else "apply"
        step = Step(patch, feature.name, feature.level, because, status)
        if patch.when is not None and not self._holds(feature, patch.when):
            return replace(step, status="inactive", note=f"{patch.when} is false")
        if not self.megatron.in_range:
            return replace(step, status="refused", note="unsupported version")
        if not prints.in_range(self.megatron.version, patch.versions):
            return replace(step, status="native", note=f"needed for {patch.versions} only")
        return self._checked(step)

    def _checked(self, step: Step) -> Step:
        result = verdict(step.patch, self.megatron)
        step = replace(step, signature=" | ".join(result.found))
        if result.absent:
            return replace(step, status="absent", note=result.absent)
        if result.problem:
            self.problems.append(f"{step.feature}: {result.problem}")
            return replace(step, status="refused", note=result.problem)
        return replace(step, note=result.note)

    def _check_conflicts(self, active: Sequence[Feature], steps: Sequence[Step]) -> None:
        owner = {feature.name: feature for feature in active}
        claims = [
            Claim(owner[step.feature], step.patch, self._asked_by(owner[step.feature]))
            for step in steps
            if step.status in (*ACTING, "refused")
        ]
        self.problems.extend(conflicts(claims))

    def _check_version(self, steps: Sequence[Step]) -> None:
        if self.megatron.in_range:
            return
        wanted = [step.patch for step in steps if step.status == "refused"]
        drifted = [p.target for p in wanted if verdict(p, self.megatron).problem]
        listed = "".join(f"\n       {target}" for target in drifted) or " none"
        self.problems.append(
            f"megatron-core {self.megatron.version} is outside the supported range"
            f" {SUPPORTED_MEGATRON}; patched names that differ there:{listed}"
        )


def _place(step: Step) -> tuple[str, bool, int]:
    # Setters come first on a target, so that wrappers go around what is there in the end.
    return step.patch.target, step.patch.kind == "wrap", step.patch.order
