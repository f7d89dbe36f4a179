"""What would be legal where a rule of context parallelism is broken, with the numbers at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed.features.context.settings import HYBRID


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def lengths(values: Mapping[str, Any]) -> str:
    """Name the nearest sequence lengths."""
    multiple = 2 * values["context_parallel_size"]
    below = values["seq_length"] // multiple * multiple
    near = [n for n in (below, below + multiple) if n]
    return f"--seq-length must be a multiple of {multiple}; near by: {_listed(near)}."


def degrees(values: Mapping[str, Any]) -> str:
    """Name the U that make nodes of more than one rank, and more than one node."""
    size = values["context_parallel_size"]
    legal = _divisors(size)[1:-1]
    return f"--ulysses-degree-in-cp for {size} ranks: {_listed(legal)}."


def windows(values: Mapping[str, Any]) -> str:
    """Name the sizes of an inner ring."""
    nodes = values["context_parallel_size"]
    if values["context_parallel_algo"] in HYBRID:
        nodes //= values["ulysses_degree_in_cp"] or 1
    return f"--cp-window-size for a ring of {nodes}: {_listed(_divisors(nodes)[:-1])}."


def heads(values: Mapping[str, Any]) -> str:
    """Name the U that divide the heads of a tensor-parallel rank, the nearest first."""
    size = values["context_parallel_size"]
    share = values["num_attention_heads"] // values["tensor_model_parallel_size"]
    wanted = size
    if values["context_parallel_algo"] in HYBRID:
        wanted = values["ulysses_degree_in_cp"] or 1
    legal = [d for d in _divisors(size) if share % d == 0]
    nearest = min(legal, key=lambda d: (abs(d - wanted), -d))
    text = f"{share} heads a tensor-parallel rank go into {_listed(legal)}, the nearest to {wanted}"
    return f"{text} is {nearest}; or allow it with --context-parallel-uneven-heads."
