"""What a context-parallel attention costs with the chosen algorithm, and with the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mindspeed.features.context.settings import ContextSettings, settings

if TYPE_CHECKING:
    from ms_parallel.context import Machine

# Rates for comparing algorithms, not for foretelling seconds: an accelerator of 200 TFLOP/s,
# hosts of 8 with 100 GB/s inside and 25 GB/s between them.
_FLOPS, _FAST, _SLOW, _DOMAIN, _LATENCY = 200e12, 100e9, 25e9, 8, 10e-6


def report(values: Mapping[str, Any]) -> str:
    """Return a table of costs of one layer and micro batch, and what the estimate prefers.

    Args:
        values: Megatron's arguments by name.
    """
    chosen = settings(values)
    size, length = values.get("context_parallel_size", 1), values.get("seq_length")
    query_heads = values.get("num_attention_heads")
    if chosen is None:
        return "the sequence is not divided"
    if not length or not query_heads:
        return "costs need --seq-length and --num-attention-heads"
    try:
        return "\n".join(_lines(values, chosen, size, length, query_heads))
    except ValueError as error:
        return f"no cost: {error}"


def _lines(
    values: Mapping[str, Any], chosen: ContextSettings, size: int, length: int, query_heads: int
) -> Iterator[str]:
    from ms_parallel.context import SeqLayout, advise, plan_attention

    heads, channels = shape(values, query_heads)
    bytes_, batch = (2 if values.get("bf16") or values.get("fp16") else 4), _batch(values)
    layout = SeqLayout.zigzag(length, size)
    arguments = chosen.arguments(size)
    plan = plan_attention(layout, _mask(values), heads=heads, head_dims=channels, **arguments)
    costs = plan.cost(bytes_, batch)
    sent = max(costs, key=lambda c: c.forward_bytes + c.backward_bytes)
    name = values.get("context_parallel_algo", "ulysses_cp_algo")
    of = f"{heads[0]} query and {heads[1]} key heads a rank, {length} tokens"
    yield f"{name} on {size} ranks, {of}:"
    yield (
        f"  a layer and micro batch: the rank that sends most sends {_mib(sent.forward_bytes)}"
        f" forward and {_mib(sent.backward_bytes)} backward, in {sent.messages} messages and"
        f" {sent.collectives} collectives"
    )
    cells = [cost.cells for cost in costs]
    yield f"  pairs of tokens a rank: {min(cells)} to {max(cells)}"
    yield "  alternatives, estimated for the rates in docs/context/megatron.md:"
    found = advise(
        layout, _mask(values), machine(size), heads=heads, head_dims=channels,
        element_bytes=bytes_, batch=batch,
    )  # fmt: skip
    yield from ("    " + line for line in str(found).splitlines())


def machine(size: int) -> Machine:
    """Return the rates that algorithms are compared with.

    Args:
        size: context-parallel ranks.
    """
    from ms_parallel.context import Link, Machine

    fast, slow = Link(_FAST, _LATENCY), Link(_SLOW, _LATENCY)
    return Machine(_FLOPS, fast, slow, _DOMAIN if size > _DOMAIN else 0)


def shape(values: Mapping[str, Any], query_heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return heads and channels of one tensor-parallel rank.

    Args:
        values: Megatron's arguments by name.
        query_heads: of the model.
    """
    share = values.get("tensor_model_parallel_size", 1)
    groups = values.get("num_query_groups")
    if values.get("multi_latent_attention"):
        part = values.get("qk_head_dim", 128) + values.get("qk_pos_emb_head_dim", 64)
        return (query_heads // share,) * 2, (part, values.get("v_head_dim", 128))
    # Megatron-LM's default of one group counts only with --group-query-attention.
    grouped = values.get("group_query_attention", groups is not None)
    key_heads = groups if grouped and groups else query_heads
    channels = values.get("kv_channels") or (values.get("hidden_size") or 0) // query_heads or 128
    return (query_heads // share, max(key_heads // share, 1)), (channels, channels)


def _mask(values: Mapping[str, Any]) -> Any:
    from mindspeed.features.ops.attention_window import window
    from ms_parallel.context import AttnMask

    found = window(values) or values.get("window_size")
    return AttnMask.causal() if not found else AttnMask.window(int(found[0]), int(found[1]))


def _batch(values: Mapping[str, Any]) -> int:
    return int(values.get("micro_batch_size") or 1)


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
