"""Switches of MindSpeed for single fused operators, which level 1 always uses.

They stay valid, so that old scripts run: at level 0 they are an error that names the level, and
where the model has no use for the operator they say so instead of doing nothing.
"""

from __future__ import annotations

from mindspeed.patching.records import Feature, Flag, Rule

FEATURE = Feature(
    name="ops.switches",
    level=1,
    doc="Switches for operators that level 1 uses anyway; checked against the model.",
    when="True",
    flags=(
        Flag(
            "--use-flash-attn",
            help="Attend without a score matrix; Megatron's own flag, which level 1 serves",
        ),
    ),
    rules=(
        Rule(
            kind="requires",
            left="use_fused_rmsnorm",
            right="normalization == 'RMSNorm'",
            text="--use-fused-rmsnorm is given, but the model has no RMSNorm",
            suggestion="Give --normalization RMSNorm, or leave the switch out.",
        ),
        Rule(
            kind="requires",
            left="use_fused_swiglu",
            right="swiglu",
            text="--use-fused-swiglu is given, but the model has no SwiGLU",
            suggestion="Give --swiglu, or leave the switch out.",
        ),
        Rule(
            kind="requires",
            left="use_fused_rotary_pos_emb",
            right="position_embedding_type in ('rope', 'yarn', 'mrope')",
            text="--use-fused-rotary-pos-emb is given, but the model has no rotary embedding",
            suggestion="Give --position-embedding-type rope, or leave the switch out.",
        ),
        Rule(
            kind="forbids",
            left="shape_order != 'SBH'",
            right="True",
            text="attention takes its inputs in the layout that Megatron's layers give, SBH",
            suggestion="Leave --shape-order out: another layout would cost a transposition.",
        ),
        Rule(
            kind="forbids",
            left="use_flash_attn",
            right="use_legacy_models",
            text="the attention of Megatron's legacy models is not replaced",
            suggestion="Leave --use-flash-attn or --use-legacy-models out.",
        ),
    ),
    packages=("ms-ops",),
    page="docs/patching.md",
)
