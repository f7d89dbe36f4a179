"""What the flags of memory features ask for; read by the model, written into its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed.patching.records import Rule

# What needs a session on each model chunk, as an expression over the arguments. A feature that
# acts on activations adds its own line.
NEEDS_SESSION = " or ".join(
    (
        "recompute_activation_function",
        "recompute_norm",
        "enable_recompute_layers_per_pp_rank",
    )
)


@dataclass(frozen=True)
class MemorySettings:
    """What is done to the memory of each model chunk.

    Attributes:
        activation: discard the outputs of activation functions.
        activation_layers: in how many layers, None for all.
        norm: discard the outputs of norms.
        norm_layers: in how many layers, None for all.
        per_rank: numbers of layers count over all chunks of a pipeline rank, not in each.
    """

    activation: bool = False
    activation_layers: int | None = None
    norm: bool = False
    norm_layers: int | None = None
    per_rank: bool = False


def conflict(code: str, left: str, right: str, text: str, remedy: str) -> Rule:
    """Return the rule that two things cannot be had together.

    Args:
        code: E-M11 to E-M19, see docs/memory/megatron.md.
        left: expression over the arguments.
        right: another.
        text: "A with B: reason".
        remedy: what to do.
    """
    return Rule(kind="forbids", left=left, right=right, text=f"{code}: {text}", suggestion=remedy)


def settings(values: Mapping[str, Any]) -> MemorySettings | None:
    """Return what the arguments ask for, None where nothing needs a session.

    Args:
        values: arguments by name; absent ones are at their defaults.
    """
    found = MemorySettings(
        bool(values.get("recompute_activation_function")),
        values.get("recompute_activation_function_num_layers"),
        bool(values.get("recompute_norm")),
        values.get("recompute_norm_num_layers"),
        bool(values.get("enable_recompute_layers_per_pp_rank")),
    )
    return None if found == MemorySettings() else found


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration of Megatron's what is done to the memory of its models.

    Args:
        config: its attribute `memory_settings` is set, to a frozen value that copies and pickles.
        values: arguments by name.
    """
    found = settings(values)
    if found is not None:
        config.memory_settings = found
