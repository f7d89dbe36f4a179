"""Tokens permuted by expert in operators instead of loops of scatter and gather."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

_UTILS = "megatron.core.transformer.moe.moe_utils"
_HERE = "mindspeed.features.ops.moe_permute"
_FUNCTIONS = "mindspeed.features.ops.moe_permute_function"
_NAMES = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_unpermute",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
)


def _slot(name: str) -> Patch:
    return Patch(
        target=f"{_UTILS}:{name}",
        kind="add",
        value=f"{_HERE}:SERVED",
        probe=f"{_HERE}:{name}_missing",
        reason="The configuration refuses moe_permute_fusion unless this name of "
        "TransformerEngine's function is bound.",
    )


def _function(name: str) -> Patch:
    return Patch(
        target=f"{_UTILS}:{name}",
        kind="wrap",
        value=f"{_FUNCTIONS}:wrap_{name}",
        probe=f"{_HERE}:engine_missing",
        reason="With fused=True it calls TransformerEngine's function only if a flag says that "
        "TransformerEngine is there, and that flag serves other functions as well.",
    )


FEATURE = Feature(
    name="ops.moe_permute",
    level=1,
    doc="moe_permute_fusion runs on ms_ops.moe_permute_map and ms_ops.moe_unpermute_map.",
    packages=("ms-ops",),
    when="moe_permute_fusion",
    patches=(
        *(_slot(name) for name in _NAMES),
        *(_function(name) for name in ("permute", "unpermute", "sort_chunks_by_idxs")),
    ),
    advise=f"{_HERE}:advise",
    page="docs/ops/moe_permute.md",
)

SERVED = "served by mindspeed's permute, unpermute and sort_chunks_by_idxs"


def engine_missing(module: Any) -> bool:
    """Whether TransformerEngine's functions are not there."""
    return not module.HAVE_TE


def _missing(name: str) -> Any:
    def probe(module: Any) -> bool:
        return not hasattr(module, name)

    return probe


fused_permute_missing = _missing("fused_permute")
fused_permute_with_probs_missing = _missing("fused_permute_with_probs")
fused_unpermute_missing = _missing("fused_unpermute")
fused_sort_chunks_by_index_missing = _missing("fused_sort_chunks_by_index")
fused_sort_chunks_by_index_with_probs_missing = _missing("fused_sort_chunks_by_index_with_probs")


def advise(config: Any) -> str:
    """Say what the fused permutation does for a configuration.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "num_experts", None):
        return "the model has no experts: nothing is permuted"
    if not getattr(config, "moe_permute_fusion", False):
        return "moe_permute_fusion is off: turn it on to use the operators"
    return "pays with weights in the sum; on a CPU plain permutation costs about the same"
