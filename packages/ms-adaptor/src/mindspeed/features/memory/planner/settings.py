"""What the planner's flags ask for: one budget, the actions it may use, pins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MIB = 1 << 20
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}ib": 1 << 10 * n for n, u in enumerate("kmgt", 1)},
    **{f"{u}b": 1000**n for n, u in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)")
NO_DEVICE = (
    "a budget of {} on the processor, which has no memory of its own: give bytes,"
    " --memory-budget 60GiB, or a share of the unplanned peak, --memory-budget 60%"
)
ACTIONS = ("keep", "discard", "recompute", "swap")

# The seed's flags, and what the planner may do under each.
OLD_FLAGS: dict[str, tuple[str, ...]] = {
    "adaptive_recompute_device_size": ("discard", "recompute"),
    "adaptive_recompute_device_swap": ("discard", "recompute"),
    "adaptive_memory_optimization": ("discard", "recompute", "swap"),
    "smart_swap": ("swap",),
}

WANTED = (
    "memory_budget or adaptive_recompute_device_size > 0 or adaptive_recompute_device_swap"
    " or adaptive_memory_optimization or smart_swap"
)


@dataclass(frozen=True)
class Budget:
    """How much memory a rank may use, of everything that is alive at one time.

    Attributes:
        kind: "bytes"; "peak", a share of what the stage needs without a plan; "device", a share
            of the device's memory; "free", what the device has left.
        amount: bytes or the share.
        text: as it was asked for.
    """

    kind: Literal["bytes", "peak", "device", "free"]
    amount: float = 0.0
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget.

        Args:
            text: "60GiB", "512 MB", "1073741824"; "60%" of the unplanned peak; "0.9" of the device.

        Raises:
            ValueError: it is none of these.
        """
        found = _SIZE.fullmatch(text.strip())
        number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "?")
        if unit == "%" and 0 < number <= 100:
            return cls("peak", number / 100, text)
        if unit == "" and 0 < number <= 1:
            return cls("device", number, text)
        if unit in _UNITS and number >= 1 and (unit or number == int(number)):
            return cls("bytes", float(int(number * _UNITS[unit])), text)
        raise ValueError(
            f"--memory-budget: got {text!r}, need bytes with a unit (60GiB), a share of the"
            " unplanned peak (60%), or a share of the device's memory (0.9)"
        )


@dataclass(frozen=True)
class PlannerSettings:
    """What is planned for each pipeline stage.

    Attributes:
        budget: of every rank.
        actions: that may be used; None: all that the device can do.
        pins: (pattern of site names, action).
        steps: how often times are measured.
        streaming: the optimizer's states were asked to leave the device as well.
    """

    budget: Budget
    actions: tuple[str, ...] | None = None
    pins: tuple[tuple[str, str], ...] = ()
    steps: int = 2
    streaming: bool = False


def settings(values: Mapping[str, Any]) -> PlannerSettings | None:
    """Return what the arguments ask for, None where nothing is to be planned.

    Args:
        values: arguments by name; absent ones are at their defaults.

    Raises:
        ValueError: a budget, an action or a pin is malformed.
    """
    pins = _pins(values.get("memory_pins"))
    if values.get("memory_budget"):
        budget = Budget.parse(str(values["memory_budget"]))
        return PlannerSettings(budget, _actions(values.get("memory_actions")), pins)
    mebibytes = values.get("adaptive_recompute_device_size", -1)
    given = {n for n in OLD_FLAGS if values.get(n)} - {"adaptive_recompute_device_size"}
    if mebibytes > 0:
        given.add("adaptive_recompute_device_size")
    if not given:
        return None
    budget = Budget("bytes", mebibytes * MIB, f"{mebibytes} MiB") if mebibytes > 0 else FREE
    allowed = tuple(a for a in ACTIONS if any(a in OLD_FLAGS[n] for n in given))
    steps = profile_steps(values.get("adaptive_recompute_profiling_step", 10))
    return PlannerSettings(budget, allowed, pins, steps, "smart_swap" in given)


FREE = Budget("free", 0.0, "what the device has left")


def profile_steps(step: int) -> int:
    """Return how often to measure, from the step at which the seed's search would decide.

    Args:
        step: of `--adaptive-recompute-profiling-step`; the first three are warm-up, 0 and less
            count as 10.
    """
    return max(1, (step if step > 0 else 10) - 3)


def _actions(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = sorted(set(found) - set(ACTIONS))
    if unknown or not found:
        raise ValueError(
            f"--memory-actions: got {text!r}, need some of {', '.join(ACTIONS)}, with commas"
        )
    return tuple(a for a in ACTIONS if a in found and a != "keep")


def _pins(text: str | None) -> tuple[tuple[str, str], ...]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    found = tuple(tuple(map(str.strip, part.split("=", 1))) for part in parts)
    if any(len(pin) != 2 or pin[1] not in ACTIONS for pin in found):
        raise ValueError(
            f"--memory-pins: got {text!r}, need PATTERN=ACTION with commas, such as"
            f" layers.0=keep; actions are {', '.join(ACTIONS)}"
        )
    return found  # type: ignore[return-value]


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration of Megatron's what is planned for its models.

    Args:
        config: its attribute `memory_plan` is set, to a frozen value.
        values: arguments by name.

    Raises:
        ValueError: as `settings`.
    """
    found = settings(values)
    if found is not None:
        config.memory_plan = found
