"""RMSNorm that saves one number a row instead of fp32 copies."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="ops.rms_norm",
    level=1,
    doc="RMSNorm runs on ms_ops.rms_norm; LayerNorm stays torch's own fused kernel.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_block:LayerNormImpl",
            kind="set",
            value="mindspeed.features.ops.norm_module:Norm",
            probe="mindspeed.features.ops.rms_norm:is_torch_norm",
            reason=(
                "The norms of the layers come from the spec provider; the last norm of a block"
                " is this module variable, which no spec of a single layer reaches."
            ),
        ),
    ),
    advise="mindspeed.features.ops.rms_norm:advise",
    page="docs/ops/rms_norm.md",
)


def is_torch_norm(module: Any) -> bool:
    """Whether the block's last norm is torch's, not one of TransformerEngine or Apex."""
    return bool(module.LayerNormImpl.__name__ == "WrappedTorchNorm")


def advise(config: Any) -> str:
    """Say what the fused norm does for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if getattr(config, "normalization", "LayerNorm") != "RMSNorm":
        return "normalization is not RMSNorm: torch's fused LayerNorm is used, nothing changes"
    return "pays at every size: fewer passes over the activations, no fp32 copy is saved"
