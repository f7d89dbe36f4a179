"""Core attention on ms_ops, in the place of Megatron's DotProductAttention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

import ms_ops
from mindspeed.features.ops.attention_alibi import AlibiBias

_CAUSAL = (AttnMaskType.causal,)
_PLAIN = (AttnMaskType.no_mask, AttnMaskType.padding, AttnMaskType.arbitrary)


class FusedAttention(DotProductAttention):
    """Megatron's module with another forward.

    Dropout while training runs the original forward: its random numbers are Megatron's, and on a
    CPU it is the faster one. All else is the operator's: windows, a softmax with an offset, and
    what the original refuses, packed sequences, a bias, and ALiBi, also with dropout.

    Attributes:
        alibi: the bias of ALiBi, None for a model with other positions.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        """Build the module as Megatron's, which takes no sizes of latent attention's heads.

        Args:
            config: of the model.
            *args: as Megatron's module takes them.
            k_channels: channels of a query and key head; those of the configuration when None.
            v_channels: channels of a value head likewise.
            **options: as Megatron's module takes them.
        """
        super().__init__(config, *args, **options)
        if k_channels is not None and options.get("softmax_scale") is None:
            self.softmax_scale *= (self.hidden_size_per_attention_head / k_channels) ** 0.5
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        found = getattr(config, "alibi", None)
        self.alibi = None if found is None else self._alibi_of_this_rank(found)

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
                attend; None for the mask that the module was built for. Not read beside a window,
                as in Megatron, unless the configuration says `masks_beside_windows`.
            attn_mask_type: not read, as in Megatron: the module's own type counts.
            attention_bias: broadcasts to [b, heads, sq, sk], added to the scaled scores.
            packed_seq_params: starts of packed sequences (format "thd"); query, key and value are
                then [t, heads, d] and so on.

        Returns:
            [s, b, heads * dv], or packed [t, heads * dv].

        Raises:
            ValueError: packed sequences with dropout, padding inside a pack that is not causal,
                or another format than "thd".
        """
        dropout = self.training and self.attention_dropout.p > 0
        masked_here = self.attn_mask_type in (*_CAUSAL, *_PLAIN)
        if packed_seq_params is not None:
            _check_packed(packed_seq_params, dropout)
            options = {"layout": "thd", **self._packed(packed_seq_params)}
        elif self.alibi is not None and not masked_here:
            raise ValueError(
                f"FusedAttention: attn_mask_type: got {self.attn_mask_type} with ALiBi, need one"
                f" of {[kind.name for kind in (*_CAUSAL, *_PLAIN)]}"
            )
        elif (dropout and self.alibi is None) or not masked_here:
            return super().forward(  # type: ignore[no-any-return]
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        else:
            options = {"layout": "sbhd", **self._masking(query, key, attention_mask)}
        options["bias"] = attention_bias
        if self.alibi is not None:
            shape = (query.shape[0], key.shape[0], query.device)
            options = self.alibi.options(*shape, masking=options)
        return self._attend(query, key, value, options, dropout)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], dropout: bool
    ) -> Tensor:
        options.update(sink=getattr(self, "softmax_offset", None), scale=self._scale())
        if dropout:
            options["dropout_p"] = self.attention_dropout.p
        # With sequence parallelism the whole block runs in Megatron's fork already.
        forked = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else nullcontext():
            out: Tensor = ms_ops.attention(query, key, value, **options)
        return out.flatten(-2)

    def _alibi_of_this_rank(self, settings: Any) -> AlibiBias:
        heads, count = self.config.num_attention_heads, self.num_attention_heads_per_partition
        return AlibiBias(settings, heads, self._rank() * count, count)

    def _rank(self) -> int:
        """Return the rank in the tensor-parallel group, which 0.14 does not keep."""
        group = getattr(self, "tp_group", None)
        rank: int = get_tensor_model_parallel_rank() if group is None else group.rank()
        return rank

    def _packed(self, packed: Any) -> dict[str, Any]:
        """Return the mask and the starts of the sequences of a pack."""
        starts = (packed.cu_seqlens_q, packed.cu_seqlens_kv)
        padded = (
            getattr(packed, "cu_seqlens_q_padded", None),
            getattr(packed, "cu_seqlens_kv_padded", None),
        )
        causal = self.attn_mask_type in (*_CAUSAL, AttnMaskType.padding_causal)
        if padded[0] is not None and not causal:
            raise ValueError(
                "FusedAttention: cu_seqlens_q_padded: got padding inside a pack without a causal"
                " mask, need none: the padding would be attended to"
            )
        # Under a causal mask no query sees the padding behind its sequence.
        q, k = (p if p is not None else s for p, s in zip(padded, starts, strict=True))
        spec = self._window_spec()
        if spec is None:
            spec = ms_ops.MaskSpec.causal() if causal else ms_ops.MaskSpec()
        return {"cu_seqlens_q": q, "cu_seqlens_k": k, "mask": spec}

    def _window_spec(self) -> ms_ops.MaskSpec | None:
        """Return the sliding window of this layer; it stands for every other mask."""
        window = getattr(self.scale_mask_softmax, "window_size", None)
        if window is None:
            return None
        return ms_ops.MaskSpec(int(window[0]), int(window[1]), "lower_right")

    def _scale(self) -> float:
        # With query-key layer scaling the module divides by the layer's number before the softmax
        # and multiplies by it inside; both together are the plain scale.
        scale = self.softmax_scale
        if self.config.apply_query_key_layer_scaling:
            scale = scale * self.layer_number
        return float(scale)

    def _masking(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """Return the mask of a call that is not packed."""
        rows, columns = query.shape[0], key.shape[0]
        window = self._window_spec()
        both = getattr(self.config, "masks_beside_windows", False) and attention_mask is not None
        if window is not None and both:
            return {"mask": ~attention_mask, "window": (window.left, window.right)}  # type: ignore[operator]
        if window is not None:
            return {"mask": window}
        if attention_mask is None:
            causal = self.attn_mask_type in _CAUSAL and rows > 1
            return {"causal": causal, "causal_align": "upper_left"}
        if attention_mask.device.type == "cpu" and _is_causal(attention_mask, rows, columns):
            return {"causal": True, "causal_align": "upper_left"}
        return {"mask": ~attention_mask}


def _check_packed(packed: Any, dropout: bool) -> None:
    if getattr(packed, "qkv_format", "thd") not in ("thd", None):
        raise ValueError(
            f"FusedAttention: packed_seq_params: got format {packed.qkv_format!r}, need 'thd'"
        )
    if dropout:
        raise ValueError(
            "FusedAttention: packed_seq_params: got packed sequences with attention dropout, need"
            " attention_dropout 0 or sequences that are not packed"
        )


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
