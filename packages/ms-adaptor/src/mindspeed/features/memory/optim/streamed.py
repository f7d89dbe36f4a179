"""--swap-optimizer: masters and moments on the host, in slices through the device in each step."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

TIMES = 16  # The flag's default.
_BUILDER = "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups"


def _refused(right: str, flag: str, reason: str) -> Rule:
    return Rule(
        kind="forbids",
        left="swap_optimizer",
        right=right,
        text=f"E-M15: --swap-optimizer with {flag}: {reason}",
        suggestion=f"Leave {flag} or --swap-optimizer out.",
    )


FEATURE = Feature(
    name="memory.swap_optimizer",
    level=2,
    doc="--swap-optimizer: fp32 masters and moments lie on the host between steps.",
    rules=(
        Rule(
            kind="requires",
            left="swap_optimizer",
            right="bf16 or fp16",
            text="E-M15: --swap-optimizer without --bf16 or --fp16: weights in fp32 are their own"
            " masters and stay on the device",
            suggestion="Give --bf16, or leave --swap-optimizer out.",
        ),
        Rule(
            kind="requires",
            left="swap_optimizer",
            right="optimizer == 'adam'",
            text="E-M15: --swap-optimizer with --optimizer other than adam: the slices are of"
            " AdamW's states",
            suggestion="Give --optimizer adam, or leave --swap-optimizer out.",
        ),
        Rule(
            kind="range",
            left="swap_optimizer_times",
            right="swap_optimizer_times >= 0",
            text="E-M15: --swap-optimizer-times must be 0 or more",
            suggestion="16 slices are usual; 0 and 1 move everything at once.",
        ),
        Rule(
            kind="requires",
            left=f"swap_optimizer_times != {TIMES}",
            right="swap_optimizer",
            text="--swap-optimizer-times acts only with --swap-optimizer",
            suggestion="Give both, or leave --swap-optimizer-times out.",
        ),
        _refused("reuse_fp32_param", "--reuse-fp32-param", "both own the masters"),
        _refused(
            "optimizer_cpu_offload",
            "--optimizer-cpu-offload",
            "that one keeps the states on the host and updates them there",
        ),
        _refused(
            "use_precision_aware_optimizer",
            "--use-precision-aware-optimizer",
            "both take the place of the fp32 masters",
        ),
        _refused(
            "use_torch_fsdp2 or use_megatron_fsdp",
            "--use-torch-fsdp2 or --use-megatron-fsdp",
            "these divide the weights and hold masters of their own",
        ),
        _refused(
            "optimizer_selection == 'fused_torch_adamw'",
            "--optimizer-selection fused_torch_adamw",
            "the slices are updated by fused_adamw",
        ),
        _refused("fp8_param_gather", "--fp8-param-gather", "weights in fp8 are no rounded masters"),
        _refused("qk_clip", "--qk-clip", "it writes masters, which lie on the host then"),
    ),
    patches=(
        Patch(
            target=_BUILDER,
            kind="wrap",
            value="mindspeed.features.memory.optim.builder:wrap_streamed",
            when="swap_optimizer",
            # Inside the one that exchanges torch's Adam at level 1.
            order=-1,
            reason="It makes the inner optimizer by name; its own switch for one that holds the"
            " masters asks for TransformerEngine.",
        ),
    ),
    packages=("ms-ops", "ms-memory"),
    advise="mindspeed.features.memory.optim.streamed:advise",
    page="docs/memory/streamed.md",
)


def advise(config: Any) -> str:
    """Say what states on the host save and cost.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    parts = getattr(config, "swap_optimizer_times", TIMES) or 1
    shared = getattr(config, "use_distributed_optimizer", False)
    weight = "12 bytes a weight, divided by the data-parallel ranks," if shared else "12 a weight"
    return (
        f"frees {weight} during forward and backward, and takes about"
        f" {min(2, parts)}/{parts} of them in a step; pays with many micro-batches a step"
    )
