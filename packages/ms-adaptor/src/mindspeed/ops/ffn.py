"""`npu_ffn`: two linear layers around an activation."""

from __future__ import annotations

import torch
from torch import Tensor

import ms_ops
from ms_ops.checks import fail

OP = "npu_ffn"


def npu_ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    *,
    expert_tokens: Tensor | None = None,
    expert_tokens_index: Tensor | None = None,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    deq_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    antiquant_scale1: Tensor | None = None,
    antiquant_scale2: Tensor | None = None,
    antiquant_offset1: Tensor | None = None,
    antiquant_offset2: Tensor | None = None,
    inner_precise: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return act(x W1 + b1) W2 + b2, see `ms_ops.ffn`.

    Args:
        x: [..., K].
        weight1: [K, N] or [E, K, N].
        weight2: [M, K2] or [E, M, K2].
        activation: as in `ms_ops.ffn`.
        expert_tokens: [E], rows of each expert.
        expert_tokens_index: [E], the row at which each expert ends.
        bias1: [N] or [E, N].
        bias2: [K2] or [E, K2].
        scale: this and all that follow quantise and are refused: weights have a floating dtype.
        offset: likewise.
        deq_scale1: likewise.
        deq_scale2: likewise.
        antiquant_scale1: likewise.
        antiquant_scale2: likewise.
        antiquant_offset1: likewise.
        antiquant_offset2: likewise.
        inner_precise: 0 or 1, a hint for fp16 on NPU; products are summed in fp32 either way, and
            1 with bf16 is refused, as the kernel does.
        output_dtype: x's dtype or None.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not match, both lists of experts, a quantising argument.
    """
    quantising = {
        "scale": scale,
        "offset": offset,
        "deq_scale1": deq_scale1,
        "deq_scale2": deq_scale2,
        "antiquant_scale1": antiquant_scale1,
        "antiquant_scale2": antiquant_scale2,
        "antiquant_offset1": antiquant_offset1,
        "antiquant_offset2": antiquant_offset2,
    }
    for name, value in quantising.items():
        if value is not None:
            fail(ValueError, OP, name, "a tensor", "None: weights with a floating dtype")
    if output_dtype not in (None, x.dtype):
        fail(ValueError, OP, "output_dtype", output_dtype, f"{x.dtype}, the dtype of x")
    if inner_precise not in (None, 0, 1) or (inner_precise == 1 and x.dtype is torch.bfloat16):
        fail(ValueError, OP, "inner_precise", inner_precise, "0, or 1 with fp16")
    if expert_tokens is not None and expert_tokens_index is not None:
        fail(ValueError, OP, "expert_tokens", "both lists", "expert_tokens or expert_tokens_index")
    return ms_ops.ffn(
        x,
        weight1,
        weight2,
        activation,
        offsets=expert_tokens_index,
        group_sizes=expert_tokens,
        bias1=bias1,
        bias2=bias2,
    )
