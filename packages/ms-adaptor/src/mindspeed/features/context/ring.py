"""Options of the ring algorithms."""

from __future__ import annotations

from typing import Any

from mindspeed.features.context.settings import RINGS
from mindspeed.patching.records import Feature, Rule

_HINTS = "mindspeed.features.context.hints"
_RING = f"context_parallel_size > 1 and context_parallel_algo in {RINGS}"
_NODES = "context_parallel_size // (ulysses_degree_in_cp or 1)"


def _ring_only(flag: str, given: str) -> Rule:
    return Rule(
        kind="requires",
        left=given,
        right=_RING,
        text=f"{flag} is about a ring, and there is none",
        suggestion="Give --context-parallel-size above 1 and --context-parallel-algo"
        " megatron_cp_algo or hybrid_cp_algo, or leave the flag out.",
    )


FEATURE = Feature(
    name="context.ring",
    level=2,
    doc="Rings of rings, send and receive on two groups, partial results merged in one operator.",
    rules=(
        _ring_only("--cp-window-size", "cp_window_size != 1"),
        _ring_only("--use-cp-send-recv-overlap", "use_cp_send_recv_overlap"),
        _ring_only("--use-fused-ring-attention-update", "use_fused_ring_attention_update"),
        Rule(
            kind="requires",
            left=f"cp_window_size != 1 and {_RING} and context_parallel_algo != 'hybrid_cp_algo'",
            right="cp_window_size > 0 and cp_window_size < context_parallel_size"
            " and context_parallel_size % cp_window_size == 0",
            text="an inner ring holds a part of the ranks that divides their number",
            hint=f"{_HINTS}:windows",
        ),
        Rule(
            kind="requires",
            left="cp_window_size != 1 and context_parallel_algo == 'hybrid_cp_algo'"
            " and ulysses_degree_in_cp",
            right=f"cp_window_size > 0 and cp_window_size < {_NODES}"
            f" and {_NODES} % cp_window_size == 0",
            text="an inner ring holds a part of the nodes of --ulysses-degree-in-cp ranks that"
            " divides their number",
            hint=f"{_HINTS}:windows",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    advise="mindspeed.features.context.ring:advise",
    page="docs/context/megatron.md",
)


def advise(config: Any) -> str:
    """Say what the options of the ring do.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    words = []
    if getattr(config, "cp_window_size", 1) != 1:
        words.append(
            "a ring of rings pays where the link between groups of ranks is slower than inside"
        )
    if getattr(config, "use_cp_send_recv_overlap", False):
        words.append("two groups pay where one works in order: HCCL and NCCL, not gloo")
    if getattr(config, "use_fused_ring_attention_update", False):
        words.append("partial results are merged by ms_ops.attention_merge with and without it")
    return "; ".join(words) or "the ring's options are at their defaults"
