"""Which keys and values of forward stay for backward."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Rule

_POLICY = "context_parallel_kv_cache_policy is not None"

FEATURE = Feature(
    name="context.kv_cache",
    level=2,
    doc="--context-parallel-kv-cache-policy: what is kept instead of being sent again.",
    rules=(
        Rule(
            kind="requires",
            left=_POLICY,
            right="context_parallel_size > 1",
            text="--context-parallel-kv-cache-policy is about a divided sequence, and this one is"
            " not divided",
            suggestion="Give --context-parallel-size, or leave the policy out.",
        ),
        Rule(
            kind="requires",
            left="context_parallel_cache_interval != 0",
            right=_POLICY,
            text="--context-parallel-cache-interval belongs to a policy, and none is given",
            suggestion="Give --context-parallel-kv-cache-policy, or leave the interval out.",
        ),
        Rule(
            kind="requires",
            left="context_parallel_cache_interval != 0 and num_layers",
            right="context_parallel_cache_interval >= 0"
            " and context_parallel_cache_interval < num_layers",
            text="--context-parallel-cache-interval must lie in [0, --num-layers)",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    advise="mindspeed.features.context.kv_cache:advise",
    page="docs/context/megatron.md",
)


def advise(config: Any) -> str:
    """Say what the policy costs and saves.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    values = vars(config)
    if values.get("context_parallel_algo", "ulysses_cp_algo") == "ulysses_cp_algo":
        heads = values.get("num_query_groups") or values.get("num_attention_heads") or 1
        share = heads // values.get("tensor_model_parallel_size", 1)
        if share >= values.get("context_parallel_size", 1):
            return (
                "every key and value head goes to one rank: keeping them as they were before the"
                " exchange saves no memory and costs another exchange"
            )
        what = "keys" if values.get("context_parallel_kv_cache_policy") == "half" else "heads"
        return f"less memory, more exchanged in backward: {what} are kept without their copies"
    return "pays where messages take longer than compute; costs the memory of what is kept"
