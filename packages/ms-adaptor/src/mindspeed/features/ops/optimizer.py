"""Which AdamW stands behind Megatron's Adam; one of them averages the weights."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

EMA_DECAY = 0.9999  # The flag's default.
_HERE = "mindspeed.features.ops"
_BUILDER = "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups"
_EMA = "optimizer_selection == 'fused_ema_adamw'"
# Where Megatron's Adam is not torch's, or holds no plain tensors.
_OTHERS = (
    "use_torch_fsdp2 or use_megatron_fsdp or optimizer_cpu_offload or use_precision_aware_optimizer"
)


def _builder(selection: str, value: str) -> Patch:
    return Patch(
        target=_BUILDER,
        kind="wrap",
        value=f"{_HERE}.optimizer_builder:{value}",
        when=f"optimizer_selection == '{selection}' and not ({_OTHERS})",
        reason="Without Apex and TransformerEngine it makes an optimizer of torch's own module by"
        " name; no argument and no variable of Megatron names the class.",
    )


FEATURE = Feature(
    name="ops.optimizer",
    level=1,
    doc="Adam steps on the fused AdamW of ms_ops, or as --optimizer-selection says.",
    when="True",
    packages=("ms-ops",),
    rules=(
        Rule(
            kind="requires",
            left="optimizer_selection != 'fused_adamw'",
            right="optimizer != 'sgd'",
            text="--optimizer-selection chooses an AdamW, and --optimizer is sgd",
            suggestion="Give --optimizer adam, or leave the selection out.",
        ),
        Rule(
            kind="requires",
            left=f"ema_decay != {EMA_DECAY}",
            right=_EMA,
            text="--ema-decay acts only with --optimizer-selection fused_ema_adamw",
            suggestion="Give both, or leave --ema-decay out.",
        ),
        Rule(
            kind="range",
            left="ema_decay",
            right="ema_decay >= 0 and ema_decay <= 1",
            text="--ema-decay must lie in [0, 1]",
            suggestion="0.999 to 0.9999 are usual.",
        ),
        Rule(
            kind="forbids",
            left="optimizer_selection != 'fused_adamw'",
            right=_OTHERS,
            text="--optimizer-selection chooses among optimizers of plain fp32 tensors; FSDP,"
            " --optimizer-cpu-offload and --use-precision-aware-optimizer have their own",
            suggestion="Leave the selection or the other flag out.",
        ),
        Rule(
            kind="forbids",
            left=_EMA,
            right="reuse_fp32_param",
            text="E-M16: --reuse-fp32-param with --optimizer-selection fused_ema_adamw: averages"
            " need fp32 weights that exist at every time",
            suggestion="Leave one of them out.",
        ),
        Rule(
            kind="forbids",
            left=_EMA,
            right="swap_optimizer",
            text="E-M15: --swap-optimizer with --optimizer-selection fused_ema_adamw: the slices"
            " that are swapped hold no averages",
            suggestion="Leave one of them out.",
        ),
    ),
    patches=(
        _builder("fused_adamw", "wrap_fused"),
        _builder("fused_torch_adamw", "wrap_torch"),
        _builder("fused_ema_adamw", "wrap_averaged"),
    ),
    advise=f"{_HERE}.optimizer:advise",
    page="docs/ops/optim.md",
)


def advise(config: Any) -> str:
    """Say what the optimizer costs for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if getattr(config, "optimizer", "adam") == "sgd":
        return "the optimizer is sgd: nothing changes"
    if getattr(config, "optimizer_selection", "fused_adamw") == "fused_ema_adamw":
        return "40 bytes a weight move in a step, and averages take 4 more a weight of memory"
    return "pays always: 28 bytes a weight move in a step, 84 without"
