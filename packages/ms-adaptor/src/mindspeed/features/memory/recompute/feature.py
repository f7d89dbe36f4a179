"""Activation functions and norms computed again in backward, in a number of layers."""

from __future__ import annotations

from typing import Any

from mindspeed.features.memory.settings import conflict
from mindspeed.patching.records import Feature, Patch, Rule

_LAYERS = "mindspeed.features.memory.recompute.layers"
_EITHER = "recompute_activation_function or recompute_norm"
_BLOCK = "recompute_granularity == 'full' and recompute_method == 'block'"


def _number(flag: str, main: str) -> tuple[Rule, Rule]:
    name = flag[2:].replace("-", "_")
    return (
        Rule(
            kind="requires",
            left=f"{name} is not None",
            right=main[2:].replace("-", "_"),
            text=f"{flag} says in how many layers, and {main} is not given",
            suggestion=f"Give {main}, or leave {flag} out.",
        ),
        Rule(
            kind="range",
            left=name,
            right=f"{name} >= 0 and (num_layers is None or {name} <= num_layers)",
            text=f"{flag} must lie in [0, --num-layers]",
        ),
    )


def _conflicts(flag: str) -> tuple[Rule, ...]:
    name = flag[2:].replace("-", "_")
    return (
        conflict(
            "E-M12",
            name,
            "recompute_granularity == 'full' and recompute_method == 'uniform'",
            f"{flag} with --recompute-method uniform: every layer is computed again as a whole",
            "Take --recompute-method block, or leave one of them out.",
        ),
        conflict(
            "E-M12",
            name,
            "recompute_granularity == 'selective'",
            f"{flag} with --recompute-granularity selective: both would drop the same tensors",
            "Leave --recompute-granularity out, or name all with --recompute-modules instead.",
        ),
        conflict(
            "E-M17",
            name,
            "distribute_saved_activations",
            f"{flag} with --distribute-saved-activations: an output that comes back whole on every"
            " rank was not divided among them",
            "Leave --distribute-saved-activations out; --sequence-parallel divides more.",
        ),
        conflict(
            "E-M18",
            name,
            "cpu_offloading or fine_grained_activation_offloading",
            f"{flag} with Megatron's activation offloading: under the hooks of that nothing else"
            " can be freed",
            "Leave one of them out; --swap-attention goes with recomputation.",
        ),
    )


_DETAILS = (
    conflict(
        "E-M12",
        "recompute_activation_function",
        "moe_shared_expert_overlap",
        "--recompute-activation-function with --moe-shared-expert-overlap: the dispatcher runs the"
        " parts of shared experts by itself",
        "Leave one of them out.",
    ),
    conflict(
        "E-M12",
        "recompute_activation_function",
        "activation_func_fp8_input_store",
        "--recompute-activation-function with activation_func_fp8_input_store: what is kept in fp8"
        " cannot be computed from",
        "Leave one of them out.",
    ),
    conflict(
        "E-M12",
        _EITHER,
        "fp8 or fp4",
        "--recompute-norm or --recompute-activation-function with --fp8-format or --fp4-format:"
        " linear layers keep quantised inputs, so that nothing is left to discard",
        "Leave one of them out.",
    ),
)


FEATURE = Feature(
    name="memory.recompute",
    level=2,
    doc="Outputs of activation functions and norms are computed again in backward.",
    rules=(
        *_number("--recompute-activation-function-num-layers", "--recompute-activation-function"),
        *_number("--recompute-norm-num-layers", "--recompute-norm"),
        *_conflicts("--recompute-activation-function"),
        *_conflicts("--recompute-norm"),
        *_DETAILS,
        Rule(
            kind="requires",
            left="enable_recompute_layers_per_pp_rank",
            right=f"virtual_pipeline_model_parallel_size and ({_EITHER} or {_BLOCK})",
            text="--enable-recompute-layers-per-pp-rank is about numbers of layers on virtual"
            " pipeline stages",
            suggestion="Give virtual stages and what is recomputed, or leave the flag out.",
        ),
    ),
    packages=("ms-memory",),
    patches=(
        Patch(
            target="megatron.core.transformer.mlp:MLP.forward",
            kind="wrap",
            value=f"{_LAYERS}:wrap_mlp",
            when="recompute_activation_function",
            reason="The activation runs inside this function, between two linear layers; no module"
            " stands for it that a spec could name.",
        ),
    ),
    advise="mindspeed.features.memory.recompute.feature:advise",
    page="docs/memory/megatron.md",
)


def advise(config: Any) -> str:
    """Say what is saved in a layer, and what it costs.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    from mindspeed.features.memory.recompute.hints import recompute_report

    return recompute_report(vars(config))
