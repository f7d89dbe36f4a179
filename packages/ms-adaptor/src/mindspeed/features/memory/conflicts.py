"""Megatron's and the pipeline's ways to save memory that exclude others, whoever serves them."""

from __future__ import annotations

from mindspeed.features.memory.settings import conflict
from mindspeed.patching.records import Feature

_BUBBLE = "recompute_in_bubble"
_EARLY = "(recompute_in_bubble or recompute_in_advance)"
_PLANNER = (
    "adaptive_recompute_device_swap or adaptive_recompute_device_size > 0"
    " or adaptive_memory_optimization or smart_swap or memory_budget"
)

FEATURE = Feature(
    name="memory.conflicts",
    level=2,
    doc="Divided activations and recomputation ahead of backward: what they exclude.",
    when=f"distribute_saved_activations or {_EARLY}",
    rules=(
        conflict(
            "E-M17",
            "distribute_saved_activations",
            "sequence_parallel",
            "--distribute-saved-activations with --sequence-parallel: each rank has its part of"
            " them already",
            "Leave --distribute-saved-activations out.",
        ),
        conflict(
            "E-M17",
            "distribute_saved_activations",
            _EARLY,
            "--distribute-saved-activations with --recompute-in-bubble or --recompute-in-advance:"
            " what is computed ahead of backward is whole on every rank",
            "Leave one of them out.",
        ),
        conflict(
            "E-M19",
            _BUBBLE,
            "recompute_in_advance",
            "--recompute-in-bubble with --recompute-in-advance: the first is for models that"
            " recompute nothing, the second for those that do",
            "Leave one of them out.",
        ),
        conflict(
            "E-M19",
            _EARLY,
            "pipeline_model_parallel_size == 1 or not virtual_pipeline_model_parallel_size",
            "--recompute-in-bubble or --recompute-in-advance with one pipeline stage, or without"
            " virtual ones: no rank waits between two chunks",
            "Give --pipeline-model-parallel-size and virtual stages, or leave the flag out.",
        ),
        conflict(
            "E-M19",
            _BUBBLE,
            "recompute_num_layers or recompute_granularity is not None",
            "--recompute-in-bubble with --recompute-granularity or --recompute-num-layers: the"
            " schedule decides what is computed again",
            "Leave the recomputation out, or take --recompute-in-advance.",
        ),
        conflict(
            "E-M19",
            "recompute_in_advance",
            "not recompute_num_layers or recompute_method == 'uniform'",
            "--recompute-in-advance with --recompute-method uniform or no --recompute-num-layers:"
            " it starts the recomputation of single layers early",
            "Give --recompute-method block and --recompute-num-layers.",
        ),
        conflict(
            "E-M19",
            _EARLY,
            "swap_attention",
            "--recompute-in-bubble or --recompute-in-advance with --swap-attention: the schedule"
            " decides what a chunk keeps",
            "Leave one of them out.",
        ),
        conflict(
            "E-M19",
            _EARLY,
            _PLANNER,
            "--recompute-in-bubble or --recompute-in-advance with a planned memory budget: the"
            " schedule decides what a chunk keeps",
            "Leave one of them out.",
        ),
    ),
    page="docs/memory/megatron.md",
)
