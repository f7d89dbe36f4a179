"""Experts' products in one operator, their weight gradients added to the main gradient in it."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

_FUNCTIONS = "mindspeed.features.ops.grouped_matmul_function"
_GEMM = "megatron.core.transformer.moe.experts:gg"

FEATURE = Feature(
    name="ops.grouped_matmul",
    level=1,
    doc="GroupedMLP multiplies with ms_ops.grouped_matmul; its weight gradients may be added to"
    " main_grad in fp32.",
    packages=("ms-ops",),
    when="True",
    rules=(
        Rule(
            kind="requires",
            left="gemm_gradient_accumulation_fusion",
            right="moe_grouped_gemm",
            text="--gemm-gradient-accumulation-fusion acts on the grouped products of experts",
            suggestion="Give --moe-grouped-gemm too; other linear layers have"
            " gradient_accumulation_fusion.",
        ),
    ),
    patches=(
        Patch(
            target=_GEMM,
            kind="set",
            value=f"{_FUNCTIONS}:PRODUCTS",
            when="not gemm_gradient_accumulation_fusion",
            probe="mindspeed.features.ops.grouped_matmul:package_missing",
            reason="GroupedMLP takes its product from this module, whose own name for it is level"
            " 0's; there is no argument for another one.",
        ),
        Patch(
            target=_GEMM,
            kind="set",
            value=f"{_FUNCTIONS}:ACCUMULATING",
            when="gemm_gradient_accumulation_fusion",
            reason="The grouped_gemm package has no product that adds to a gradient, and GroupedMLP"
            " no argument for another one.",
        ),
    ),
    advise="mindspeed.features.ops.grouped_matmul:advise",
    page="docs/ops/matmul.md",
)


def package_missing(module: Any) -> bool:
    """Whether the grouped_gemm package, whose kernels are for CUDA, is not there."""
    return module.gg.grouped_gemm is None


def advise(config: Any) -> str:
    """Say what grouped products do for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "moe_grouped_gemm", False):
        return "moe_grouped_gemm is off: experts are multiplied one by one, nothing changes"
    if not getattr(config, "gemm_gradient_accumulation_fusion", False):
        return "gemm_gradient_accumulation_fusion is off: weight gradients are rounded, then added"
    return "pays in 16 bits: gradients are added in fp32, unrounded, and none is allocated"
