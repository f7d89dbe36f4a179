"""The softmax of attention that writes its scores out, which dropout on them needs."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="ops.softmax",
    level=1,
    doc="Softmax of written-out attention scores runs on ms_ops.scaled_masked_softmax.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.fusions.fused_softmax:"
            "FusedScaleMaskSoftmax.forward_torch_softmax",
            kind="wrap",
            value="mindspeed.features.ops.softmax_function:wrap_softmax",
            reason="Attention modules make this class themselves; it is no part of any spec.",
        ),
    ),
    advise="mindspeed.features.ops.softmax:advise",
    page="docs/ops/softmax.md",
)


def advise(config: Any) -> str:
    """Say when the fused softmax acts for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "attention_dropout", 0.0):
        return "attention_dropout is 0: attention writes no scores out, nothing changes"
    if getattr(config, "bf16", False) or getattr(config, "fp16", False):
        return "backward keeps the weights in 16 bits and no fp32 copy of them"
    return "acts on every training step; in fp32 expect no more than a little time"
