"""Heads are traded inside nodes of U ranks, keys and values move between the nodes."""

from __future__ import annotations

from typing import Any

from mindspeed.features.context.settings import HYBRID
from mindspeed.patching.records import Feature, Rule

_HINTS = "mindspeed.features.context.hints"
_IS_HYBRID = f"context_parallel_algo in {HYBRID}"

FEATURE = Feature(
    name="context.hybrid",
    level=2,
    doc="--ulysses-degree-in-cp: how many ranks of the hybrid algorithms trade heads.",
    when=f"ulysses_degree_in_cp is not None or {_IS_HYBRID}",
    rules=(
        Rule(
            kind="requires",
            left="ulysses_degree_in_cp is not None",
            right=f"context_parallel_size > 1 and {_IS_HYBRID}",
            text="--ulysses-degree-in-cp is given without a hybrid algorithm",
            suggestion="Give --context-parallel-algo hybrid_cp_algo, or leave the degree out.",
            hint=f"{_HINTS}:degrees",
        ),
        Rule(
            kind="requires",
            left=_IS_HYBRID,
            right="ulysses_degree_in_cp is not None",
            text="a hybrid algorithm needs --ulysses-degree-in-cp",
            hint=f"{_HINTS}:degrees",
        ),
        Rule(
            kind="requires",
            left=f"{_IS_HYBRID} and context_parallel_size > 1 and ulysses_degree_in_cp is not None",
            right="ulysses_degree_in_cp > 1 and ulysses_degree_in_cp < context_parallel_size"
            " and context_parallel_size % ulysses_degree_in_cp == 0",
            text="nodes of more than one rank, and more than one of them, must make up all ranks",
            suggestion="With one node take ulysses_cp_algo, with nodes of one megatron_cp_algo.",
            hint=f"{_HINTS}:degrees",
        ),
        Rule(
            kind="requires",
            left=f"{_IS_HYBRID} and num_attention_heads and ulysses_degree_in_cp"
            " and not context_parallel_uneven_heads",
            right="num_attention_heads % (tensor_model_parallel_size * ulysses_degree_in_cp) == 0",
            text="the heads do not divide among tensor-parallel ranks times the Ulysses degree",
            hint=f"{_HINTS}:heads",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    advise="mindspeed.features.context.hybrid:advise",
    page="docs/context/megatron.md",
)


def advise(config: Any) -> str:
    """Say what the degree does.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    return "put the ranks of a node where links are fast: consecutive ranks trade heads"
