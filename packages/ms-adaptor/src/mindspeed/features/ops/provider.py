"""The spec provider of level 1: Megatron's local one with our norm and core attention.

Imports Megatron. The classes that it names are built by Megatron's own spec builders.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import LocalSpecProvider

from mindspeed.features.ops.attention_module import FusedAttention
from mindspeed.features.ops.norm_module import Norm


class OpsSpecProvider(LocalSpecProvider):
    """Linear layers and experts of Megatron, norm and attention of ms_ops."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Name the norm class; which norm it builds depends on the configuration."""
        return Norm

    def core_attention(self) -> type:
        """Name the core attention class."""
        return FusedAttention


def layer_spec(*, normalization: str = "LayerNorm", qk_layernorm: bool = False) -> Any:
    """Return the spec of one GPT layer on ms_ops, for callers who build their own model.

    Needs no patch: it changes the submodules of Megatron's local layer spec.

    Args:
        normalization: "LayerNorm" or "RMSNorm", as in Megatron's configuration.
        qk_layernorm: normalise queries and keys of each head.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization=normalization, qk_layernorm=qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention = layer.self_attention.submodules
    attention.core_attention = FusedAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return spec
