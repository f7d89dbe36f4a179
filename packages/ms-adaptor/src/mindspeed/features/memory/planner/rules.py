"""What does not go with the planner, and what its flags need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mindspeed.features.memory.planner.settings import NO_DEVICE, WANTED, settings
from mindspeed.features.memory.settings import conflict
from mindspeed.patching.records import Rule

_CODE = "E-M11"
_PLANNED = "the memory planner"
_PIN = "Leave it out; what a layer must do is a pin: --memory-pins layers.0=recompute."

# Another owner of the same tensors: the flag, and when it is on.
_MANUAL: dict[str, str] = {
    "--recompute-granularity": "recompute_granularity",
    "--recompute-activations": "recompute_activations",
    "--moe-layer-recompute": "moe_layer_recompute",
    "--recompute-activation-function": "recompute_activation_function",
    "--recompute-norm": "recompute_norm",
    "--swap-attention": "swap_attention",
    "--swap-layer-input": "swap_layer_input",
    "--distribute-saved-activations": "distribute_saved_activations",
    "--cpu-offloading-num-layers": "cpu_offloading_num_layers",
    "--fine-grained-activation-offloading": "fine_grained_activation_offloading",
}
# What a micro-step cannot show, or cannot be measured in.
_UNSUITED: dict[str, tuple[str, str]] = {
    "--cuda-graph-impl": (
        "cuda_graph_impl != 'none' or enable_cuda_graph or external_cuda_graph",
        "a captured graph replays what it saved, whatever is planned",
    ),
    "--overlap-moe-expert-parallel-comm": (
        "overlap_moe_expert_parallel_comm",
        "two micro-batches take turns inside a layer, which has no forward of its own then",
    ),
    "--hybrid-context-parallel": (
        "hybrid_context_parallel",
        "every micro-batch has another share of its sequence",
    ),
    "--fp8-format": ("fp8", "measuring would change the scales that fp8 has gathered"),
    "--use-legacy-models": ("use_legacy_models", "only layers of megatron-core are planned"),
}
_SEARCH = "adaptive_recompute_device_swap or adaptive_recompute_device_size > 0"


def _rows() -> Iterator[Rule]:
    for flag, on in _MANUAL.items():
        text = f"{_PLANNED} with {flag}: two owners of the same tensors"
        yield conflict(_CODE, WANTED, on, text, _PIN)
    for flag, (on, reason) in _UNSUITED.items():
        yield conflict(_CODE, WANTED, on, f"{_PLANNED} with {flag}: {reason}", "Leave one out.")
    old = (
        ("--adaptive-memory-optimization", "adaptive_memory_optimization"),
        ("--smart-swap", "smart_swap"),
    )
    for flag, name in old:
        text = f"--adaptive-recompute-device-* with {flag}: two answers to what may be done"
        yield conflict(_CODE, _SEARCH, name, text, "Give --memory-budget and --memory-actions.")
    yield conflict(
        _CODE,
        "adaptive_memory_optimization",
        "smart_swap",
        "--adaptive-memory-optimization with --smart-swap: two answers to what may be done",
        "Give --memory-budget and --memory-actions.",
    )
    yield conflict(
        _CODE,
        "memory_budget",
        f"{_SEARCH} or adaptive_memory_optimization or smart_swap",
        "--memory-budget with a flag that is an older name for it: two budgets",
        "Keep --memory-budget, with --memory-actions.",
    )


RULES: tuple[Rule, ...] = (
    *_rows(),
    Rule(
        kind="requires",
        left="memory_actions",
        right="memory_budget",
        text="--memory-actions says what may be done for --memory-budget, which is not given",
        suggestion="Give --memory-budget, or leave it out.",
    ),
    Rule(
        kind="requires",
        left="memory_pins",
        right=WANTED,
        text="--memory-pins says what the memory planner must do, and nothing is planned",
        suggestion="Give --memory-budget, or leave it out.",
    ),
    Rule(
        kind="range",
        left="adaptive_recompute_device_size",
        right="adaptive_recompute_device_size > 0 or adaptive_recompute_device_size == -1",
        text="--adaptive-recompute-device-size must be a number of MiB above 0, or -1 for none",
    ),
    Rule(
        kind="requires",
        left="adaptive_recompute_profiling_step != 10",
        right=_SEARCH + " or adaptive_memory_optimization or smart_swap",
        text="--adaptive-recompute-profiling-step says how long is measured, and nothing is",
        suggestion="Give --adaptive-recompute-device-size or -swap, or leave it out.",
    ),
    Rule(
        kind="requires",
        left="adaptive_recompute_profiling_step != 10 and train_iters",
        right="adaptive_recompute_profiling_step <= train_iters",
        text="--adaptive-recompute-profiling-step lies beyond the last step of training",
        suggestion="Give a step up to --train-iters.",
    ),
    Rule(
        kind="requires",
        left="device == 'cpu' and (adaptive_recompute_device_swap or adaptive_memory_optimization"
        " or smart_swap)",
        right="adaptive_recompute_device_size > 0",
        text="the processor has no memory of its own that could be left over",
        suggestion="Give --memory-budget 60GiB or 60% (of the unplanned peak) instead, or an"
        " --adaptive-recompute-device-size.",
    ),
)


def check(values: Mapping[str, Any], device: str) -> None:
    """Refuse what rules cannot say, before any process starts.

    Args:
        values: arguments by name.
        device: "cpu", "npu" or "cuda".

    Raises:
        ValueError: a budget, an action or a pin is malformed, or needs a device with memory.
    """
    found = settings(values)
    if found is None or device != "cpu":
        return
    if found.budget.kind in ("device", "free"):
        raise ValueError(NO_DEVICE.format(found.budget.text))
    if found.actions == ("swap",) and not os.environ.get("MS_MEMORY_SIM"):
        raise ValueError(
            "swapping alone on the processor, which has no other memory to swap to: let layers be"
            " recomputed too, --memory-actions recompute,swap"
        )
