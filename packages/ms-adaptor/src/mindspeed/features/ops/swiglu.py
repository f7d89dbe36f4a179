"""SwiGLU that saves only its input and compiles nothing."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="ops.swiglu",
    level=1,
    doc="The fused SwiGLU of MLP and experts runs on ms_ops, with its bias or its weights.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.fusions.fused_bias_swiglu:bias_swiglu_impl",
            kind="replace",
            value="mindspeed.features.ops.swiglu_function:bias_swiglu_impl",
            when="swiglu or gated_linear_unit",
            reason=(
                "The local spec provider's activation module is reached only with"
                " use_te_activation_func, which the local GPT spec does not read; the MLP calls"
                " this function by name."
            ),
        ),
        Patch(
            target="megatron.core.fusions.fused_bias_swiglu:weighted_bias_swiglu_impl",
            kind="replace",
            value="mindspeed.features.ops.swiglu_function:weighted_bias_swiglu_impl",
            when="swiglu or gated_linear_unit",
            reason="Experts call this function by name, with the weights of the router.",
        ),
        Patch(
            target="megatron.core.transformer.moe.experts:GroupedMLP.__init__",
            kind="wrap",
            value="mindspeed.features.ops.swiglu_function:wrap_grouped_experts",
            when="swiglu or gated_linear_unit",
            reason="Grouped experts make their activation themselves and compile it.",
        ),
    ),
    advise="mindspeed.features.ops.swiglu:advise",
    page="docs/ops/swiglu.md",
)


def advise(config: Any) -> str:
    """Say whether the fused SwiGLU is reached by a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not (getattr(config, "swiglu", False) or getattr(config, "gated_linear_unit", False)):
        return "the MLP is not gated: SwiGLU is not used"
    fused = getattr(config, "bias_activation_fusion", getattr(config, "bias_swiglu_fusion", True))
    if not fused:
        return "bias_activation_fusion is off: turn it on, or the MLP never calls the fused SwiGLU"
    return "pays at every size: one saved tensor instead of three"
