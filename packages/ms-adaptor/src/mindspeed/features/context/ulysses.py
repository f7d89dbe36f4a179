"""One key and value head for all ranks: gathered along the sequence."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Rule

FEATURE = Feature(
    name="context.ulysses",
    level=2,
    doc="--use-ulysses-allgather-kv: with one key and value head a rank the exchange of Ulysses"
    " is a gather of it.",
    rules=(
        Rule(
            kind="requires",
            left="use_ulysses_allgather_kv",
            right="context_parallel_size > 1 and context_parallel_algo == 'ulysses_cp_algo'",
            text="--use-ulysses-allgather-kv is a form of ulysses_cp_algo on a divided sequence",
            suggestion="Give that --context-parallel-algo; kvallgather_cp_algo gathers keys and"
            " values and leaves queries where they are.",
        ),
        Rule(
            kind="requires",
            left="use_ulysses_allgather_kv",
            right="num_query_groups and num_query_groups == tensor_model_parallel_size",
            text="--use-ulysses-allgather-kv needs one key and value head a tensor-parallel rank",
            suggestion="Leave the flag out: the exchange sends each rank the heads that its"
            " queries need, whatever their number.",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    advise="mindspeed.features.context.ulysses:advise",
    page="docs/context/megatron.md",
)


def advise(config: Any) -> str:
    """Say what the flag changes.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    return "changes nothing: the exchange sends the one head to every rank, and no copies of it"
