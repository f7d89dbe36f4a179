"""Megatron-LM's closed formula for the FLOPs of a training step, for `mindspeed train`.

Every product counts three times (forward, gradient of the input, gradient of the weight) and two
operations for each term; attention counts half of its score matrix, whatever computes it. In
Megatron-LM itself its own function is asked, which knows more models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any


def step_formula(values: Mapping[str, Any]) -> Callable[[int], int]:
    """The formula of a job: FLOPs of all ranks for a number of sequences.

    Args:
        values: Megatron-LM's arguments by name, or those of a `TrainConfig`.
    """
    if "padded_vocab_size" not in values:
        from mindspeed.train.config import TrainConfig, section_of_leaf

        leaves = {name: values[name] for name in section_of_leaf() if name in values}
        return _of_config(TrainConfig.of(**leaves))
    from megatron.training.training import num_floating_point_operations

    # The function writes into what it is given.
    return lambda sequences: round(
        num_floating_point_operations(SimpleNamespace(**values), sequences)
    )


def _of_config(config: Any) -> Callable[[int], int]:
    model, moe = config.model, config.moe
    hidden, length = model.hidden_size, model.seq_length
    head_dim = model.kv_channels or hidden // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    q, kv = head_dim * model.num_attention_heads, head_dim * groups
    attention = hidden * (q + 2 * kv) + q * length + q * hidden  # s/2 for each of two products
    per_width = (3 if model.swiglu else 2) * hidden
    sparse = 0
    if moe.num_experts is not None:
        sparse = len(range(0, model.num_layers, moe.moe_layer_freq))
    expert = moe.moe_ffn_hidden_size or config.ffn_hidden_size
    widths = moe.moe_router_topk * expert + (moe.moe_shared_expert_intermediate_size or 0)
    dense = (model.num_layers - sparse) * config.ffn_hidden_size
    feed_forward = per_width * (dense + sparse * widths)
    terms = model.num_layers * attention + feed_forward + hidden * config.padded_vocab_size
    return lambda sequences: int(6 * sequences * length * terms)
