"""Flags of the mask-driven algorithms, which say what these do anyway."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Rule

_TASKS = "context_parallel_algo in ('adaptive_cp_algo', 'hybrid_adaptive_cp_algo')"


def _needs(flag: str, given: str, right: str, need: str) -> Rule:
    return Rule(
        kind="requires",
        left=given,
        right=right,
        text=f"{flag} needs {need}",
        suggestion="Leave the flag out, or give what it needs.",
    )


_NEED = "--context-parallel-algo adaptive_cp_algo or hybrid_adaptive_cp_algo"

FEATURE = Feature(
    name="context.adaptive",
    level=2,
    doc="Tiles of the mask that are not empty are shared out, by moving keys or queries.",
    rules=(
        _needs(
            "--attention-mask-on-cpu",
            "attention_mask_on_cpu",
            "context_parallel_size > 1 and attention_mask_type == 'general'",
            "--attention-mask-type general and a divided sequence: otherwise there is no mask",
        ),
        _needs(
            "--adaptive-cp-without-coarse",
            "adaptive_cp_without_coarse",
            _TASKS,
            _NEED,
        ),
        _needs(
            "--adaptive-cp-dynamic-attn-mask",
            "adaptive_cp_dynamic_attn_mask",
            f"{_TASKS} and attention_mask_type == 'general'",
            f"{_NEED}, and --attention-mask-type general",
        ),
        _needs(
            "--adaptive-cp-only-reschedule",
            "adaptive_cp_only_reschedule",
            _TASKS,
            _NEED,
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    advise="mindspeed.features.context.adaptive:advise",
    page="docs/context/megatron.md",
)


def advise(config: Any) -> str:
    """Say when mask-driven placement pays.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    if getattr(config, "attention_mask_type", "causal") != "general":
        return "a causal mask leaves no rank without work: megatron_cp_algo sends less"
    return (
        "plans follow each batch's mask, at full resolution and on the host; tokens stay where"
        " Megatron puts them"
    )
