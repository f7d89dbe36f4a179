"""What memory features save in a layer, by formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def recompute_report(values: Mapping[str, Any]) -> str:
    """Return a line for each thing that is computed again: bytes a layer, and their price.

    Args:
        values: Megatron's arguments by name.
    """
    if not values.get("seq_length") or not values.get("hidden_size"):
        return "bytes need --seq-length and --hidden-size"
    return "\n".join(_lines(values)) or "nothing is computed again"


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    width = 2 if values.get("bf16") or values.get("fp16") else 4
    tokens = values["seq_length"] // values.get("context_parallel_size", 1)
    rows = tokens * (values.get("micro_batch_size") or 1)
    share = values.get("tensor_model_parallel_size", 1)
    if values.get("recompute_activation_function"):
        hidden = values.get("ffn_hidden_size") or 4 * values["hidden_size"]
        saved = width * rows * hidden // share
        yield (
            f"activation functions: {_mib(saved)} a layer and micro-batch in flight, for one more"
            f" activation; {_count(values.get('recompute_activation_function_num_layers'))}"
        )
    if values.get("recompute_norm"):
        split = share if values.get("sequence_parallel") else 1
        saved = 2 * width * rows * values["hidden_size"] // split
        yield (
            f"norms: {_mib(saved)} a layer and micro-batch in flight, for two more norms;"
            f" {_count(values.get('recompute_norm_num_layers'))}"
        )


def _count(number: int | None) -> str:
    return "all layers" if number is None else f"{number} layers of a stage"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
