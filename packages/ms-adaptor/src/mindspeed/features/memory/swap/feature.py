"""--swap-attention: what attention and the norms save waits on the host."""

from __future__ import annotations

from mindspeed.features.memory.settings import SWAP_MIN_BYTES, SWAP_PARTS, conflict
from mindspeed.patching.records import Feature, Flag, Rule

_HINTS = "mindspeed.features.memory.swap.hints"
_STAGE = "num_layers // pipeline_model_parallel_size"
_ANY = "(swap_attention or swap_layer_input)"
# Name in Megatron's configuration -> its flag.
_NATIVE = {
    "cpu_offloading": "--cpu-offloading-num-layers",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
}


def native_offloading(flag: str) -> tuple[Rule, ...]:
    """Return what refuses Megatron's own offloading beside a flag that swaps.

    Args:
        flag: which.
    """
    name = flag[2:].replace("-", "_")
    return tuple(
        conflict(
            "E-M18",
            name,
            other,
            f"{flag} with {native}: both place saved tensors by hooks, of which torch calls the"
            " innermost alone",
            f"Leave {native} out: {flag} needs no TransformerEngine.",
        )
        for other, native in _NATIVE.items()
    )


_CONFLICTS = (
    *native_offloading("--swap-attention"),
    conflict(
        "E-M13",
        "swap_attention",
        "recompute_granularity == 'full'",
        "--swap-attention with --recompute-granularity full: recomputed layers save nothing inside,"
        " so that nothing is left to swap",
        "Leave --recompute-granularity out: with --swap-attention, --recompute-num-layers"
        " recomputes MLPs; or give --swap-layer-input instead.",
    ),
    conflict(
        "E-M13",
        "swap_attention and context_parallel_size == 1",
        "attention_dropout",
        "--swap-attention with --attention-dropout: attention with dropout is not fused, and its"
        " score matrices would travel",
        "Give --attention-dropout 0.",
    ),
    conflict(
        "E-M13",
        "swap_attention and recompute_granularity == 'selective' and recompute_modules",
        "'layernorm' in recompute_modules or 'mla_up_proj' in recompute_modules"
        " or 'moe_act' in recompute_modules",
        "--swap-attention with --recompute-modules layernorm, mla_up_proj or moe_act: Megatron"
        " empties these tensors while they are copied",
        "Leave them out of --recompute-modules; --recompute-norm and"
        " --recompute-activation-function go with --swap-attention.",
    ),
    conflict(
        "E-M13",
        "swap_attention and not recompute_num_layers",
        "recompute_method == 'block'",
        "--swap-attention with --recompute-method block: without a number of layers none is"
        " swapped",
        "Give --recompute-num-layers, or leave --recompute-method out.",
    ),
)

FEATURE = Feature(
    name="memory.swap_activations",
    level=2,
    doc="Saved tensors of attention and norms wait in host memory, and come back ahead of"
    " backward.",
    flags=(
        Flag(
            "--swap-depth",
            type="int",
            default=1,
            help="Over how many layers' time copies to and from the host may stretch",
        ),
        Flag(
            "--swap-min-bytes",
            type="int",
            default=SWAP_MIN_BYTES,
            help="Saved tensors smaller than this stay on the device",
        ),
        Flag(
            "--swap-host-bytes",
            type="int",
            help="Host memory that the swapped tensors of a rank may take",
        ),
    ),
    rules=(
        *_CONFLICTS,
        Rule(
            kind="requires",
            left="swap_attention and recompute_num_layers and num_layers",
            right=f"recompute_num_layers > 0 and recompute_num_layers <= {_STAGE}",
            text="--recompute-num-layers with --swap-attention is a number of layers of one"
            " pipeline rank",
            hint=f"{_HINTS}:layers",
        ),
        Rule(
            kind="requires",
            left=f"swap_modules != '{SWAP_PARTS}'",
            right="swap_attention",
            text="--swap-modules names what --swap-attention swaps, and that is not given",
            suggestion="Give --swap-attention, or leave --swap-modules out.",
        ),
        Rule(
            kind="requires",
            left=f"swap_depth != 1 or swap_min_bytes != {SWAP_MIN_BYTES}"
            " or swap_host_bytes is not None",
            right=_ANY,
            text="--swap-depth, --swap-min-bytes and --swap-host-bytes are about swapping, and"
            " nothing is swapped",
            suggestion="Give --swap-attention or --swap-layer-input, or leave them out.",
        ),
        Rule(
            kind="requires",
            left=_ANY,
            right="swap_depth >= 0 and swap_min_bytes >= 0"
            " and (swap_host_bytes is None or swap_host_bytes > 0)",
            text="--swap-depth and --swap-min-bytes must be 0 or more, --swap-host-bytes more than"
            " 0",
        ),
    ),
    packages=("ms-memory",),
    advise=f"{_HINTS}:advise",
    page="docs/memory/megatron.md",
)
