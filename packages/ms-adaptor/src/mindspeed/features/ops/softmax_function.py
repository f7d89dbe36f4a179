"""Megatron's softmax under a mask, on ms_ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ms_ops


def wrap_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Serve `FusedScaleMaskSoftmax.forward_torch_softmax` where the operator can.

    A softmax with an offset, a window, a mask function of another model or a mask that is not
    boolean keeps Megatron's code. A row without any key gives zeros; Megatron's averages there.
    """

    @functools.wraps(original)
    def forward(self: Any, input: Tensor, mask: Tensor | None, *rest: Any, **named: Any) -> Tensor:
        offset = rest[0] if rest else named.get("softmax_offset")
        if offset is not None or not _serves(self, input, mask):
            return original(self, input, mask, *rest, **named)
        causal = _causal(self, input, mask)
        scale = 1.0 if self.scale is None else float(self.scale)
        return ms_ops.scaled_masked_softmax(input, mask, scale, causal=causal)

    return forward


def _causal(module: Any, scores: Tensor, mask: Tensor | None) -> bool:
    """Whether Megatron makes the triangle itself; for one query alone it does not."""
    return mask is None and module.attn_mask_type.name == "causal" and scores.size(2) > 1


def _serves(module: Any, scores: Tensor, mask: Tensor | None) -> bool:
    from megatron.core.transformer.utils import attention_mask_func

    square = scores.size(2) == scores.size(3)
    return (
        getattr(module, "window_size", None) is None
        and module.mask_func is attention_mask_func
        and (mask is None or mask.dtype is torch.bool)
        and (square or not _causal(module, scores, mask))
    )
