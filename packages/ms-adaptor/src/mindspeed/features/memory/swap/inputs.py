"""--swap-layer-input: the inputs of recomputed layers wait on the host."""

from __future__ import annotations

from mindspeed.features.memory.settings import conflict
from mindspeed.features.memory.swap.feature import native_offloading
from mindspeed.patching.records import Feature, Flag, Rule

FEATURE = Feature(
    name="memory.swap_layer_input",
    level=2,
    doc="What full recomputation keeps, the inputs of layers, waits in host memory.",
    flags=(
        Flag(
            "--swap-layer-input",
            help="Move the inputs that full recomputation keeps to the host",
        ),
    ),
    rules=(
        *native_offloading("--swap-layer-input"),
        Rule(
            kind="requires",
            left="swap_layer_input",
            right="recompute_granularity == 'full' and recompute_num_layers",
            text="E-M14: --swap-layer-input without full recomputation: no layer keeps its input"
            " alone, so that there is nothing to swap",
            suggestion="Give --recompute-granularity full with --recompute-method and"
            " --recompute-num-layers, or --swap-attention instead.",
        ),
        conflict(
            "E-M14",
            "swap_layer_input",
            "swap_attention",
            "--swap-layer-input with --swap-attention: one wants layers recomputed, the other what"
            " they save",
            "Leave one of them out.",
        ),
    ),
    packages=("ms-memory",),
    advise="mindspeed.features.memory.swap.hints:advise_inputs",
    page="docs/memory/megatron.md",
)
