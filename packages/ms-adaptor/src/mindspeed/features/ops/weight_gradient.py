"""Weight gradients of linear layers added to the main gradient, without Apex."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

_LAYERS = "megatron.core.tensor_parallel.layers"
_HERE = "mindspeed.features.ops.weight_gradient"

FEATURE = Feature(
    name="ops.weight_gradient",
    level=1,
    doc="gradient_accumulation_fusion adds weight gradients in fp32 without Apex.",
    packages=("ms-ops",),
    when="gradient_accumulation_fusion",
    rules=(
        Rule(
            kind="forbids",
            left="gradient_accumulation_fusion and device != 'cuda'",
            right="defer_embedding_wgrad_compute",
            text="The deferred embedding gradient imports Apex's extension by itself",
            suggestion="Leave --defer-embedding-wgrad-compute out.",
        ),
    ),
    patches=(
        Patch(
            target=f"{_LAYERS}:fused_weight_gradient_mlp_cuda",
            kind="add",
            value=f"{_HERE}:KERNELS",
            probe=f"{_HERE}:apex_missing",
            reason="The linear layers call Apex's extension by this name, which is unbound "
            "without it; there is no argument to give another one.",
        ),
        Patch(
            target=f"{_LAYERS}:_grad_accum_fusion_available",
            kind="set",
            value=f"{_HERE}:AVAILABLE",
            probe=f"{_HERE}:marked_missing",
            reason="The layers refuse the configuration unless this module variable is true.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/ops/matmul.md",
)

AVAILABLE = True


def _accumulate(total_input: Any, grad_output: Any, grad: Any) -> None:
    """Add grad_output^T total_input to `grad` in its own precision."""
    import ms_ops

    ms_ops.matmul_add_(grad, total_input, grad_output)


# What the extension offers: the names tell the dtype of the accumulator.
KERNELS = SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate)


def apex_missing(module: Any) -> bool:
    """Whether the extension of Apex is not there."""
    return not hasattr(module, "fused_weight_gradient_mlp_cuda")


def marked_missing(module: Any) -> bool:
    """Whether the module says that it has no extension."""
    return not module._grad_accum_fusion_available


def advise(config: Any) -> str:
    """Say what the accumulation does for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "gradient_accumulation_fusion", False):
        return "gradient_accumulation_fusion is off: the gradient is made, then added"
    if getattr(config, "fp16", False) or getattr(config, "bf16", False):
        return "pays: the product is added in fp32, unrounded, and no gradient is allocated"
    return "pays: no gradient is allocated before it is added"
