"""Rotary embedding in one pass less, with fp32 angles and without a saved copy of its input."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

_UTILS = "megatron.core.models.common.embeddings.rope_utils"

FEATURE = Feature(
    name="ops.rope",
    level=1,
    doc="Rotary position embedding runs on ms_ops.rope.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target=f"{_UTILS}:_apply_rotary_pos_emb_bshd",
            kind="replace",
            value="mindspeed.features.ops.rope_function:apply_bshd",
            reason=(
                "Megatron's slot for a fused function is used only with --apply-rope-fusion and"
                " not for every form; all forms pass through this function."
            ),
        ),
        Patch(
            target=f"{_UTILS}:fused_apply_rotary_pos_emb",
            kind="set",
            value="mindspeed.features.ops.rope_function:apply_fused",
            probe="mindspeed.features.ops.rope:slot_is_empty",
            reason=(
                "Megatron's own slot: without it the configuration refuses apply_rope_fusion"
                " where Transformer Engine is missing."
            ),
        ),
    ),
    advise="mindspeed.features.ops.rope:advise",
    page="docs/ops/rope.md",
)


def slot_is_empty(module: Any) -> bool:
    """Whether no other fused rotary function (Transformer Engine's) is there."""
    return module.fused_apply_rotary_pos_emb is None


def advise(config: Any) -> str:
    """Say what the fused rotary embedding does for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    kind = getattr(config, "position_embedding_type", "learned_absolute")
    if kind not in ("rope", "yarn", "mrope"):
        return f"position_embedding_type is {kind!r}: there is nothing to rotate"
    return "pays at every size; in bf16 it also rounds once where Megatron rounds three times"
