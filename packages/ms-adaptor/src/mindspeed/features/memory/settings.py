"""What the flags of memory features ask for; read by the model, written into its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed.patching.records import Rule
from mindspeed.patching.suggest import nearest

# What needs a session on each model chunk, as an expression over the arguments. A feature that
# acts on activations adds its own line.
NEEDS_SESSION = " or ".join(
    (
        "recompute_activation_function",
        "recompute_norm",
        "enable_recompute_layers_per_pp_rank",
        "swap_attention",
        "swap_layer_input",
    )
)

SWAP_MIN_BYTES = 524_288
SWAP_PARTS = "input_norm,self_attention,post_attention_norm"  # The default of --swap-modules.
# Name of a part of a layer -> its module in Megatron's layer.
PARTS = {
    "input_norm": "input_layernorm",
    "self_attention": "self_attention",
    "post_attention_norm": "pre_mlp_layernorm",
    "mlp": "mlp",
}


@dataclass(frozen=True)
class MemorySettings:
    """What is done to the memory of each model chunk.

    Attributes:
        activation: discard the outputs of activation functions.
        activation_layers: in how many layers, None for all.
        norm: discard the outputs of norms.
        norm_layers: in how many layers, None for all.
        per_rank: numbers of layers count over all chunks of a pipeline rank, not in each.
        swap_parts: modules of a layer whose saved tensors go to the host.
        swap_layers: in how many layers of a pipeline rank, None for all.
        swap_inputs: what full recomputation keeps goes to the host.
        swap_depth: over how many layers' time copies may stretch.
        swap_min_bytes: smaller tensors stay.
        swap_host_bytes: most bytes on the host, of all chunks of a process; None for any.
        mlp_layers: layers of a pipeline rank whose MLP is recomputed beside that.
    """

    activation: bool = False
    activation_layers: int | None = None
    norm: bool = False
    norm_layers: int | None = None
    per_rank: bool = False
    swap_parts: tuple[str, ...] = ()
    swap_layers: int | None = None
    swap_inputs: bool = False
    swap_depth: int = 1
    swap_min_bytes: int = SWAP_MIN_BYTES
    swap_host_bytes: int | None = None
    mlp_layers: int = 0


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

    Raises:
        ValueError: --swap-modules names something else than `PARTS`.
    """
    found = MemorySettings(
        bool(values.get("recompute_activation_function")),
        values.get("recompute_activation_function_num_layers"),
        bool(values.get("recompute_norm")),
        values.get("recompute_norm_num_layers"),
        bool(values.get("enable_recompute_layers_per_pp_rank")),
        **_swapping(values),
    )
    return None if found == MemorySettings() else found


def _swapping(values: Mapping[str, Any]) -> dict[str, Any]:
    attention, inputs = bool(values.get("swap_attention")), bool(values.get("swap_layer_input"))
    if not attention and not inputs:
        return {}
    number = values.get("recompute_num_layers") if attention else None
    return {
        "swap_parts": parts(values.get("swap_modules", SWAP_PARTS)) if attention else (),
        "swap_layers": number if values.get("recompute_method") == "block" else None,
        "swap_inputs": inputs,
        "swap_depth": values.get("swap_depth", 1),
        "swap_min_bytes": values.get("swap_min_bytes", SWAP_MIN_BYTES),
        "swap_host_bytes": values.get("swap_host_bytes"),
        "mlp_layers": number or 0,
    }


def parts(names: str) -> tuple[str, ...]:
    """Return the modules of a layer that --swap-modules names.

    Args:
        names: of parts, separated by commas.

    Raises:
        ValueError: a name is none of `PARTS`, or there is none.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in given if name not in PARTS]
    if unknown or not given:
        close = nearest(unknown[0], PARTS) if unknown else ""
        raise ValueError(
            f"--swap-modules: got {names!r}, need some of {', '.join(PARTS)}, separated by"
            f" commas{close}"
        )
    return tuple(PARTS[name] for name in PARTS if name in given)


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration of Megatron's what is done to the memory of its models.

    Args:
        config: its attribute `memory_settings` is set, to a frozen value that copies and pickles.
        values: arguments by name.
    """
    found = settings(values)
    if found is not None:
        config.memory_settings = found
