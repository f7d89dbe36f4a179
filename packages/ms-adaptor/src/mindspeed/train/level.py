"""Which optimization levels can be had here, and turning one on for this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mindspeed.train.config import TrainConfig


class LevelError(RuntimeError):
    """The asked level cannot be had in this installation."""


def available_levels() -> dict[int, str | None]:
    """Level to the reason why it cannot be used, None when it can; reads no Megatron."""
    from mindspeed import levels

    out: dict[int, str | None] = {}
    for level in levels.LEVELS:
        absent = levels.missing(levels.needed_for(level))
        advice = sorted({levels.extra_for(name) for name in absent})
        names = " and ".join(absent)
        out[level] = f"{names} not installed: pip install '{advice[0]}'" if absent else None
    return out


def levels_with_features(config: TrainConfig) -> list[int]:
    """The levels that change anything for a configuration, lowest first."""
    from mindspeed import levels
    from mindspeed.features import load_features
    from mindspeed.patching.plan import draft

    active = draft(config.plan_values(), max(levels.LEVELS)).features
    return sorted({0, *(f.level for f in load_features() if f.name in active)})


def config_for(config: TrainConfig, level: int, levels: Sequence[int]) -> TrainConfig:
    """The configuration of one of the levels that train.

    Level 0 as the base line of a comparison goes without the flags of higher levels' features;
    alone it keeps them, so that they are refused. Levels side by side profile into folders of
    their own.
    """
    if len(levels) > 1:
        from mindspeed.features.profile.trace import for_level

        flags = dict(config.feature_flags)
        if level == 0:
            flags = {name: flags[name] for name in flags.keys() & _flags_of_level_0()}
        config = config.replace(feature_flags=tuple(sorted(for_level(flags, level).items())))
    return config.replace(optimization_level=level)


def _flags_of_level_0() -> set[str]:
    from mindspeed.features import load_features

    return {f.attribute for feature in load_features() if not feature.level for f in feature.flags}


def activate_level(config: TrainConfig) -> Any:
    """Installs the device layer and applies the level's plan; must run before Megatron loads.

    Returns:
        The handle whose `undo` takes the patches back; None when the one-line import has put a
        plan in force, which then is not ours to take back.

    Raises:
        LevelError: the level is unknown or its packages are not installed.
        PlanError: a feature's rule refuses the configuration.
    """
    level = config.optimization_level
    reasons = available_levels()
    if level not in reasons:
        raise LevelError(f"--optimization-level must be one of {sorted(reasons)}, got {level}")
    if reasons[level] is not None:
        raise LevelError(f"--optimization-level {level}: {reasons[level]}")
    import mindspeed
    from mindspeed import device

    device.install()
    shared = "mindspeed.megatron_adaptor" in sys.modules
    handle = mindspeed.activate(config.plan_values(), level=level)
    return None if shared else handle
