"""Attention over a divided sequence: which algorithm, and how it gets into the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed.features.context.settings import ContextSettings, is_local, mark, settings
from mindspeed.features.ops.script import before_post_init
from mindspeed.patching.records import Feature, Flag, Patch, Rule

_HERE = "mindspeed.features.context.algorithm"
_HINTS = "mindspeed.features.context.hints"
_DIVIDED = "context_parallel_size > 1"
_GIVEN = (
    "context_parallel_algo != 'ulysses_cp_algo' or context_parallel_uneven_heads"
    " or context_parallel_check_plans"
)
_EVEN = f"{_DIVIDED} and num_attention_heads and not context_parallel_uneven_heads"

FEATURE = Feature(
    name="context.algorithm",
    level=2,
    doc="--context-parallel-size above 1: attention by Ulysses, ring, both, gather, or tasks.",
    when=f"{_DIVIDED} or {_GIVEN}",
    flags=(
        Flag(
            "--context-parallel-uneven-heads",
            help="Let context-parallel ranks get different numbers of heads",
        ),
        Flag(
            "--context-parallel-check-plans",
            help="Compare each attention plan between the ranks before its first use: different"
            " ones are then an error and no hang",
        ),
    ),
    rules=(
        Rule(
            kind="requires",
            left=_GIVEN,
            right=_DIVIDED,
            text="a flag of context parallelism is given, and the sequence is not divided",
            suggestion="Give --context-parallel-size, or leave the flag out.",
        ),
        Rule(
            kind="requires",
            left=f"{_DIVIDED} and seq_length",
            right="seq_length % (2 * context_parallel_size) == 0",
            text="Megatron's batches divide into two chunks of equal length a rank",
            hint=f"{_HINTS}:lengths",
        ),
        Rule(
            kind="requires",
            left=f"{_EVEN} and context_parallel_algo == 'ulysses_cp_algo'",
            right="num_attention_heads % (tensor_model_parallel_size * context_parallel_size) == 0",
            text="the heads do not divide among tensor-parallel times context-parallel ranks",
            hint=f"{_HINTS}:heads",
        ),
        Rule(
            kind="requires",
            left=f"{_DIVIDED} and num_attention_heads and num_query_groups",
            right="num_attention_heads % num_query_groups == 0",
            text="query heads are no multiple of key and value heads",
            suggestion="Choose --num-query-groups among the divisors of --num-attention-heads.",
        ),
        Rule(
            kind="forbids",
            left=f"{_DIVIDED} and position_embedding_type == 'alibi'"
            " and attention_mask_type == 'general'",
            right="(alibi_fusion_attn_type is None or alibi_diagonal_opposite)"
            " and not fill_neg_inf",
            text="a bias of ALiBi with signs needs a causal mask on a divided sequence",
            suggestion="Give --alibi-fusion-attn-type 2 or 3, or --attention-mask-type causal.",
        ),
        Rule(
            kind="forbids",
            left=_DIVIDED,
            right="use_legacy_models",
            text="Megatron's legacy models cannot divide a sequence",
            suggestion="Leave --use-legacy-models or --context-parallel-size out.",
        ),
    ),
    packages=("ms-ops", "ms-parallel"),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            kind="wrap",
            value=f"{_HERE}:wrap_post_init",
            when=_DIVIDED,
            order=5,
            reason="The attention modules read the configuration, and no field of it names an"
            " algorithm other than TransformerEngine's.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/context/megatron.md",
)


def tell(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration that a script of Megatron-LM makes how attention is divided.

    Raises:
        ValueError: TransformerEngine's attention is asked for, and a flag that it does not read.
    """
    if is_local(values):
        mark(config, values)
    elif settings(values) != ContextSettings():
        raise ValueError(
            f"--transformer-impl: got {values['transformer_impl']!r} with flags for dividing"
            " attention, need 'local': TransformerEngine divides attention in its own way, chosen"
            " by --cp-comm-type"
        )


wrap_post_init = before_post_init(tell)


def advise(config: Any) -> str:
    """Print the cost of the chosen algorithm and of the others.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    from mindspeed.features.context.report import report

    return report(vars(config))
