"""Core attention on ms_ops, in the place of Megatron's DotProductAttention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

import ms_ops

_CAUSAL = (AttnMaskType.causal,)
_PLAIN = (AttnMaskType.no_mask, AttnMaskType.padding, AttnMaskType.arbitrary)


class FusedAttention(DotProductAttention):
    """Megatron's module with another forward.

    Whatever the fused operator does not do (dropout while training, a softmax with an offset,
    sliding windows, attention bias) runs the original forward, with the same numbers as before.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d].
            key: [s, b, groups, d].
            value: [s, b, groups, dv].
            attention_mask: bool, broadcasts to [b, heads, sq, sk], True where a query must NOT
                attend; None for the mask that the module was built for.
            attn_mask_type: not read, as in Megatron: the module's own type counts.
            attention_bias: refused by Megatron.
            packed_seq_params: refused by Megatron.

        Returns:
            [s, b, heads * dv].
        """
        if not self._fused(attention_bias, packed_seq_params):
            return super().forward(  # type: ignore[no-any-return]
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        causal, mask = self._masking(query, key, attention_mask)
        out = ms_ops.attention(
            query,
            key,
            value,
            layout="sbhd",
            causal=causal,
            causal_align="upper_left",
            mask=mask,
            scale=self._scale(),
        )
        return out.flatten(2)

    def _fused(self, attention_bias: Tensor | None, packed_seq_params: Any) -> bool:
        softmax = self.scale_mask_softmax
        return (
            attention_bias is None
            and packed_seq_params is None
            and not (self.training and self.attention_dropout.p > 0)
            and getattr(self, "softmax_offset", None) is None
            and getattr(softmax, "window_size", None) is None
            and self.attn_mask_type in (*_CAUSAL, *_PLAIN)
        )

    def _scale(self) -> float:
        # With query-key layer scaling the module divides by the layer's number before the softmax
        # and multiplies by it inside; both together are the plain scale.
        scale = self.softmax_scale
        if self.config.apply_query_key_layer_scaling:
            scale = scale * self.layer_number
        return float(scale)

    def _masking(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None
    ) -> tuple[bool, Tensor | None]:
        """Return (causal, mask with True where a query may attend)."""
        rows, columns = query.shape[0], key.shape[0]
        if attention_mask is None:
            return self.attn_mask_type in _CAUSAL and rows > 1, None
        if attention_mask.device.type == "cpu" and _is_causal(attention_mask, rows, columns):
            return True, None
        return False, ~attention_mask


def _is_causal(attention_mask: Tensor, rows: int, columns: int) -> bool:
    """Say whether a mask is the plain triangle; reads its values, so only for CPU tensors.

    Data loaders of Megatron build the triangle for every batch. Finding that out costs one
    comparison of bits and saves the kernel half of its work.
    """
    if attention_mask.shape[-2:] != (rows, columns) or rows != columns:
        return False
    if torch.compiler.is_compiling() or attention_mask.numel() != rows * columns:
        return False
    triangle = ~ms_ops.causal_mask(rows, columns, "upper_left", attention_mask.device)
    return torch.equal(attention_mask.view(rows, columns), triangle)
