"""Feed-forward layers by torch_npu's kernel, for inference.

The kernel takes the ends of the experts as host numbers, gated activations in fp16 without experts
only, and a bias of fp16 beside fp16, of fp32 beside bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..device import LOW_PRECISION
from ..registry import Facts
from .ffn import GATED, compose
from .npu_groups import WIDTH

EXPERTS = 256


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    ends: Tensor | None,
    bias1: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    """Return act(x W1 + b1) W2 + b2."""
    if not _serves(x, weight1, weight2):
        return compose(x, weight1, weight2, activation, ends, bias1, bias2)
    first, second = (None if b is None else _bias(b, x) for b in (bias1, bias2))
    y: Tensor = npu.op("npu_ffn")(
        x.contiguous(), weight1.contiguous(), weight2.contiguous(), activation,
        expert_tokens_index=None if ends is None else ends.tolist(),
        bias1=first, bias2=second, inner_precise=1 if activation in GATED else 0,
    )  # fmt: skip
    return y


def supports(facts: Facts) -> str | None:
    """Verdict on a layer."""
    half, groups = facts.dtype is torch.float16, facts.option("groups_on")
    if facts.option("activation") in GATED and (not half or groups is not None):
        return "its kernel has gated activations in fp16 without experts only"
    if groups not in (None, "cpu"):
        return "its kernel takes the ends of the experts from the host"
    if half and torch.float32 in (facts.option("bias1"), facts.option("bias2")):
        return "no fp32 bias beside fp16"
    return npu.declines(facts, LOW_PRECISION)


def _serves(x: Tensor, weight1: Tensor, weight2: Tensor) -> bool:
    if 0 in (x.numel(), weight1.numel(), weight2.numel()) or x.dim() > 8:
        return False
    experts = weight1.shape[0] if weight1.dim() == 3 else 0
    return experts <= EXPERTS and max(*weight1.shape[-2:], *weight2.shape[-2:]) <= WIDTH


def _bias(bias: Tensor, x: Tensor) -> Tensor:
    return (bias if x.dtype is torch.float16 else bias.float()).contiguous()
