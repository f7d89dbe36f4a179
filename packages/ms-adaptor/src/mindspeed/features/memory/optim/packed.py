"""--reuse-fp32-param: bf16 weights and 16-bit residues in the place of fp32 masters."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

_BUILD = "mindspeed.features.memory.optim.builder"
_BUILDER = "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups"
_EXACT = "npu_deterministic or deterministic_mode"


def _builder(when: str, value: str) -> Patch:
    return Patch(
        target=_BUILDER,
        kind="wrap",
        value=f"{_BUILD}:{value}",
        when=f"reuse_fp32_param and {when}",
        # Inside the one that exchanges torch's Adam at level 1.
        order=-1,
        reason="It makes the inner optimizer by name; its own switch for one that holds the masters"
        " asks for TransformerEngine.",
    )


def _refused(right: str, flag: str, reason: str, remedy: str) -> Rule:
    return Rule(
        kind="forbids",
        left="reuse_fp32_param",
        right=right,
        text=f"E-M16: --reuse-fp32-param with {flag}: {reason}",
        suggestion=remedy,
    )


def _without(flag: str) -> str:
    return f"Leave {flag} or --reuse-fp32-param out."


FEATURE = Feature(
    name="memory.packed_optimizer",
    level=2,
    doc="--reuse-fp32-param: fp32 masters in two bytes a parameter beside the bf16 weights.",
    rules=(
        Rule(
            kind="requires",
            left="reuse_fp32_param",
            right="bf16",
            text="E-M16: --reuse-fp32-param without --bf16: a residue of 16 bits completes a bf16"
            " weight and no other",
            suggestion="Give --bf16, or leave --reuse-fp32-param out.",
        ),
        Rule(
            kind="requires",
            left="reuse_fp32_param",
            right="optimizer == 'adam'",
            text="E-M16: --reuse-fp32-param with --optimizer other than adam: the step on packed"
            " masters is AdamW's",
            suggestion="Give --optimizer adam, or leave --reuse-fp32-param out.",
        ),
        _refused(
            "use_precision_aware_optimizer",
            "--use-precision-aware-optimizer",
            "both take the place of the fp32 masters",
            _without("--use-precision-aware-optimizer"),
        ),
        _refused(
            "optimizer_cpu_offload",
            "--optimizer-cpu-offload",
            "that one keeps fp32 masters on the host",
            _without("--optimizer-cpu-offload"),
        ),
        _refused(
            "use_torch_fsdp2 or use_megatron_fsdp",
            "--use-torch-fsdp2 or --use-megatron-fsdp",
            "these divide the weights and hold masters of their own",
            "Give --use-distributed-optimizer in its place, or leave --reuse-fp32-param out.",
        ),
        _refused(
            "optimizer_selection == 'fused_torch_adamw'",
            "--optimizer-selection fused_torch_adamw",
            "the step on packed masters is that of fused_adamw",
            _without("--optimizer-selection"),
        ),
        _refused(
            "fp8_param_gather",
            "--fp8-param-gather",
            "weights in fp8 are not the high halves of masters",
            _without("--fp8-param-gather"),
        ),
        _refused(
            "qk_clip",
            "--qk-clip",
            "it writes weights between steps, where a master is weight and residue together",
            _without("--qk-clip"),
        ),
    ),
    patches=(
        _builder(f"not ({_EXACT})", "wrap_rna"),
        _builder(f"({_EXACT})", "wrap_rne"),
    ),
    packages=("ms-ops", "ms-memory"),
    advise="mindspeed.features.memory.optim.packed:advise",
    page="docs/memory/packed.md",
)


def advise(config: Any) -> str:
    """Say what packed masters save and cost.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    shared = getattr(config, "use_distributed_optimizer", False)
    saved = "2 bytes a weight, divided by the data-parallel ranks" if shared else "2 bytes a weight"
    return f"saves {saved}; costs two passes over the masters in each optimizer step"
