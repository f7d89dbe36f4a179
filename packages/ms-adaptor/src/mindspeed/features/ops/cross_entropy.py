"""Cross entropy that keeps the logits, in their dtype, instead of an fp32 softmax."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

_FUNCTIONS = "mindspeed.features.ops.cross_entropy_function"

FEATURE = Feature(
    name="ops.cross_entropy",
    level=1,
    doc="cross_entropy_loss_fusion saves the logits and no softmax; the unfused form indexes by no"
    " mask.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.fusions.fused_cross_entropy:fused_vocab_parallel_cross_entropy",
            kind="replace",
            value=f"{_FUNCTIONS}:fused_vocab_parallel_cross_entropy",
            reason="The language module calls this function by name.",
        ),
        Patch(
            target="megatron.core.tensor_parallel.cross_entropy:"
            "VocabParallelCrossEntropy.calculate_predicted_logits",
            kind="replace",
            value=f"{_FUNCTIONS}:calculate_predicted_logits",
            reason="The assignment to masked places stands inside the function.",
        ),
    ),
    advise="mindspeed.features.ops.cross_entropy:advise",
    page="docs/ops/cross_entropy.md",
)


def advise(config: Any) -> str:
    """Say what the cross entropy does for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "cross_entropy_loss_fusion", False):
        return "cross_entropy_loss_fusion is off: turn it on to keep no softmax"
    if getattr(config, "bf16", False) or getattr(config, "fp16", False):
        return "pays: 2 bytes a logit are kept instead of 4, and 2 instead of 6 at the peak"
    return "pays in passes over the logits; in fp32 as many bytes are kept as without"
