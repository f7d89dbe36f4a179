"""The arguments of `ms_ops.attention` that make the bias of ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ms_ops
from mindspeed.features.ops.alibi import Alibi


class AlibiBias:
    """The bias of the heads of one tensor-parallel rank.

    Args:
        settings: which form.
        heads: number of heads of the whole model.
        start: first head of this rank.
        count: how many it has.
    """

    def __init__(self, settings: Alibi, heads: int, start: int, count: int) -> None:
        self.settings = settings
        self.heads = (heads, start, start + count)
        self._slopes: dict[torch.device, Tensor] = {}

    def slopes(self, device: torch.device) -> Tensor:
        """Return fp32 [count], made once a device."""
        if device not in self._slopes:
            total, start, stop = self.heads
            self._slopes[device] = ms_ops.alibi_slopes(total, start=start, stop=stop, device=device)
        return self._slopes[device]

    def options(
        self, rows: int, keys: int, device: torch.device, masking: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the masking with the bias in it.

        Args:
            rows: number of queries; fewer than keys when earlier ones are cached.
            keys: number of keys.
            device: of both.
            masking: arguments of `ms_ops.attention` that say what a query sees.

        Raises:
            ValueError: a bias with signs for packed sequences that see later keys.
        """
        masking = _without_later_keys(masking) if self.settings.fill else masking
        if self.settings.form == "signed" and not _is_causal(masking):
            return self._written_out(keys, device, masking)
        # Where no later key is seen, slope d and -slope |d| are the same number.
        slopes = {"alibi_slopes": self.slopes(device)}
        if self.settings.form == "sqrt":
            slopes["alibi_sqrt"] = True  # type: ignore[assignment]
        cached = {"q_start": keys - rows} if keys != rows and "cu_seqlens_q" not in masking else {}
        return {**masking, **slopes, **cached}

    def _written_out(
        self, keys: int, device: torch.device, masking: dict[str, Any]
    ) -> dict[str, Any]:
        if "cu_seqlens_q" in masking:
            raise ValueError(
                "FusedAttention: alibi: got a bias with signs for packed sequences that see later"
                " keys, need a causal mask, or --alibi-fusion-attn-type 2"
            )
        # slope (j - i) and slope j differ by one number a row: the softmax is the same.
        row = ms_ops.alibi_bias(self.slopes(device), 1, keys, form="key").unsqueeze(0)
        bias = masking.get("bias")
        return {**masking, "bias": row if bias is None else bias + row.to(bias.dtype)}


def _is_causal(masking: dict[str, Any]) -> bool:
    mask = masking.get("mask")
    if isinstance(mask, ms_ops.MaskSpec):
        return mask.right is not None and mask.right <= 0 and not mask.prefix
    return bool(masking.get("causal", False))


def _without_later_keys(masking: dict[str, Any]) -> dict[str, Any]:
    mask = masking.get("mask")
    if not isinstance(mask, ms_ops.MaskSpec):
        return {"causal_align": "upper_left", **masking, "causal": True}
    right = 0 if mask.right is None else min(mask.right, 0)
    return {**masking, "mask": ms_ops.MaskSpec(mask.left, right, mask.align)}
