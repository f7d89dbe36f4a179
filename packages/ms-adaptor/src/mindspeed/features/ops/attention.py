"""Attention without the score matrix, and the spec provider that brings level 1 to the layers."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

_REASON = (
    "Megatron's spec builders make their own provider and take none as an argument;"
    " the class is the narrowest place that all of them share."
)

FEATURE = Feature(
    name="ops.attention",
    level=1,
    doc="Core attention of the local layer specs runs on ms_ops.attention.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.models.backends:LocalSpecProvider",
            kind="replace",
            value="mindspeed.features.ops.provider:OpsSpecProvider",
            when="context_parallel_size == 1 or level < 2",
            reason=_REASON,
        ),
        Patch(
            target="megatron.core.models.backends:LocalSpecProvider",
            kind="replace",
            value="mindspeed.features.context.provider:ContextSpecProvider",
            when="context_parallel_size > 1 and level == 2",
            reason=_REASON,
        ),
    ),
    advise="mindspeed.features.ops.attention:advise",
    page="docs/ops/attention.md",
)


def advise(config: Any) -> str:
    """Say when fused attention pays for a configuration, and when it does not act.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout and getattr(config, "context_parallel_size", 1) == 1:
        return (
            f"attention_dropout is {dropout}: training steps keep Megatron's unfused attention;"
            " set it to 0 for the fused one"
        )
    length = getattr(config, "seq_length", None)
    if length is not None and length < 128:
        return f"seq_length {length} is short: the score matrix is small, expect no gain"
    return "pays from a few hundred tokens on: time and memory no longer grow with a score matrix"
