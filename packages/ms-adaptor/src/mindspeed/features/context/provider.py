"""The spec provider of divided sequences: that of level 1 with another core attention.

Imports Megatron.
"""

from __future__ import annotations

from mindspeed.features.context.attention_module import MegatronCPAttention
from mindspeed.features.ops.provider import OpsSpecProvider


class ContextSpecProvider(OpsSpecProvider):
    """Level 1 for context_parallel_size > 1."""

    def core_attention(self) -> type:
        """Name the core attention class."""
        return MegatronCPAttention
