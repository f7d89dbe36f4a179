"""Turns an optimization level on for this process."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from mindspeed.train.config import TrainConfig


class LevelError(RuntimeError):
    """The asked level cannot be had in this installation."""


def available_levels() -> dict[int, str | None]:
    """Level to the reason why it cannot be used; None when it can."""
    missing = None if _has_provider() else "this version has no level-1 operators"
    if missing is None and importlib.util.find_spec("ms_ops") is None:
        missing = "package ms-ops is not installed: pip install 'mindspeed[l1]'"
    return {0: None, 1: missing, 2: missing}


def _has_provider() -> bool:
    try:
        return importlib.util.find_spec("mindspeed.features.ops.provider") is not None
    except ModuleNotFoundError:
        return False


def activate_level(config: TrainConfig) -> Any:
    """Installs the device layer and applies the level's plan; must run before Megatron loads.

    Returns:
        The handle whose `undo` takes the patches back; None when the one-line import has put a
        plan in force, which then is not ours to take back.

    Raises:
        LevelError: the level is unknown or its parts are not installed.
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
