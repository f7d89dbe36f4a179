"""Going on with averaged weights from a checkpoint that holds none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed.features.level0.averages import NAME


def averaging(values: Mapping[str, Any]) -> bool:
    """Whether a configuration keeps averages.

    Args:
        values: every option by name.
    """
    return bool(values.get("optimizer_selection") == "fused_ema_adamw")


def drop_averages(state: Any) -> None:
    """Take the averages out of what is asked of a checkpoint, at any depth."""
    if isinstance(state, dict):
        state.pop(NAME, None)
    children = state.values() if isinstance(state, dict) else state
    for child in children:
        if isinstance(child, (dict, list)):
            drop_averages(child)


def restart_averages(optimizer: Any) -> None:
    """Start the averages at the weights that were loaded.

    Args:
        optimizer: Megatron's.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(part.optimizer, "restart"):
            part.optimizer.restart()
