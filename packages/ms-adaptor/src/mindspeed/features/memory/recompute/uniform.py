"""Uniform recomputation whose groups do not divide the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="memory.uniform",
    level=2,
    doc="The last group of layers of --recompute-method uniform may be shorter than the others.",
    when="recompute_granularity == 'full' and recompute_method == 'uniform'",
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_block:TransformerBlock._get_layer",
            kind="wrap",
            value="mindspeed.features.memory.recompute.uniform:wrap_get_layer",
            reason="Where groups do not divide the layers, it is asked for layers beyond the last.",
        ),
    ),
    page="docs/memory/megatron.md",
)


class NoLayer:
    """Stands for a layer beyond the last: it returns what it is given.

    Args:
        layer_number: of the last layer.
    """

    def __init__(self, layer_number: int) -> None:
        self.layer_number = layer_number

    def __call__(self, hidden_states: Any, context: Any = None, **_: Any) -> tuple[Any, Any]:
        """Return the hidden states and the context unchanged."""
        return hidden_states, context


def wrap_get_layer(original: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    """Fill the last group of uniform recomputation with layers that do nothing."""

    @functools.wraps(original)
    def get_layer(self: Any, layer_number: int) -> Any:
        beyond = layer_number >= len(self.layers)
        if beyond and len(self.layers) and self.config.recompute_method == "uniform":
            return NoLayer(self.layers[-1].layer_number)
        return original(self, layer_number)

    return get_layer
