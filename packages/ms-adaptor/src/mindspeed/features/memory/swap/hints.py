"""What swapping frees and moves for a configuration, and the numbers that would be legal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIB = 1 << 20
_NEEDS = "bytes need --seq-length, --micro-batch-size, --hidden-size and --num-attention-heads"


def layers(values: Mapping[str, Any]) -> str:
    """Name the numbers of layers that a pipeline rank has."""
    most = values["num_layers"] // values["pipeline_model_parallel_size"]
    return f"--recompute-num-layers: 1 to {most}."


def attention_bytes(config: Any) -> int:
    """Return what the norms and attention of one layer save on a rank, bytes.

    w s b 3h / t1 + w s b (3h + 3 hkv) / t + 4 s b a / t with w bytes an element, t tensor-parallel
    ranks, and t1 those that sequence parallelism divides by. The first term are the inputs of two
    norms and of the projection. The second are q and k after the rotation, the projection's whole
    output, of which v is a view, and attention's output; the third is its log-sum-exp. The
    statistics of the norms are left out: they lie below any sensible `swap_min_bytes`.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    # Megatron-LM's number of groups counts with its own switch alone.
    grouped = getattr(config, "group_query_attention", True)
    groups = (grouped and getattr(config, "num_query_groups", None)) or heads
    kv = hidden * groups // heads
    divided = getattr(config, "tensor_model_parallel_size", 1)
    along = divided if getattr(config, "sequence_parallel", False) else 1
    tokens, width = _tokens(config), _width(config)
    elements = 3 * hidden * divided // along + 3 * hidden + 3 * kv
    nbytes: int = tokens * (width * elements + 4 * heads) // divided
    return nbytes


def advise(config: Any) -> str:
    """Say what --swap-attention frees a layer, and what hides its copies.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    if not _sized(config):
        return _NEEDS
    nbytes = attention_bytes(config)
    return (
        f"frees about {nbytes / MIB:.1f} MiB a layer and micro-batch; hidden where"
        f" --swap-depth layers compute for longer than that travels"
        f" ({nbytes / 25e6:.2f} ms each way at 25 GB/s). Pays at long sequences"
    )


def advise_inputs(config: Any) -> str:
    """Say what --swap-layer-input frees a layer.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    if not _sized(config):
        return _NEEDS
    nbytes = _tokens(config) * _width(config) * config.hidden_size
    if getattr(config, "sequence_parallel", False):
        nbytes //= config.tensor_model_parallel_size
    return (
        f"frees {nbytes / MIB:.1f} MiB a recomputed layer and micro-batch, and moves as much each"
        " way: little beside the layer's computation"
    )


def _sized(config: Any) -> bool:
    names = ("seq_length", "micro_batch_size", "hidden_size", "num_attention_heads")
    return all(getattr(config, name, None) for name in names)


def _tokens(config: Any) -> int:
    length: int = config.seq_length // getattr(config, "context_parallel_size", 1)
    return length * int(config.micro_batch_size)


def _width(config: Any) -> int:
    return 2 if getattr(config, "bf16", False) or getattr(config, "fp16", False) else 4
