"""Grouped products of 8-bit integers by torch_npu's kernel.

It scales integer sums per column and per row and rounds once: with bf16 scales to bf16, with fp32
ones to fp16. Activations it has only beside scales per row. A list of one group is illegal there:
an empty second group makes two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..device import LOW_PRECISION
from ..registry import Facts
from . import portable
from .npu_groups import ends_on, serves

ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2, "fast_gelu": 4, "silu": 5}
# What the kernel rounds to, by the dtype of the scales.
OUTPUTS = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}


def quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    per_token_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    output_dtype: torch.dtype,
) -> Tensor:
    """Return act((x_e W_e + bias_e) * scale_e * per_token_scale)."""
    rows, columns = x.shape[0], weight.shape[2]
    if 0 in (rows, columns):
        return x.new_empty((rows, columns), dtype=output_dtype)
    if not x.shape[1]:
        # Sums over nothing are those of zeros.
        x, weight = x.new_zeros((rows, 1)), weight.new_zeros((weight.shape[0], 1, columns))
    if not serves(x, weight, offsets):
        args = (per_token_scale, bias, activation, output_dtype)
        return portable.quant(x, weight, scale, offsets, *args)
    if offsets.shape[0] == 1:
        weight, scale, offsets = (torch.cat((t, t)) for t in (weight, scale, offsets))
        bias = None if bias is None else torch.cat((bias, bias))
    if per_token_scale is None and activation != "none":
        per_token_scale = x.new_ones(rows, dtype=torch.float32)
    y: Tensor = npu.op("npu_grouped_matmul")(
        [x.contiguous()], [weight.contiguous()],
        bias=_list(bias), scale=_list(scale), per_token_scale=_list(per_token_scale),
        group_list=ends_on(offsets, x), split_item=3, group_type=0, group_list_type=0,
        act_type=ACTIVATIONS[activation], output_dtype=output_dtype,
    )[0]  # fmt: skip
    return y


def weight_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    weight_offset: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return x_e W_e + bias_e for sizes that the kernel serves."""
    # The kernel adds fp16 to fp16, and fp32 to bf16; it wants an offset in any case.
    rows = bias if bias is None or x.dtype is torch.float16 else bias.float()
    shift = torch.zeros_like(scale) if weight_offset is None else weight_offset
    y: Tensor = npu.op("npu_grouped_matmul")(
        [x.contiguous()], [weight.contiguous()], bias=_list(rows),
        antiquant_scale=_list(scale), antiquant_offset=_list(shift),
        group_list=ends_on(offsets, x), split_item=3, group_type=0, group_list_type=0,
    )[0]  # fmt: skip
    return y


def supports_quant(facts: Facts) -> str | None:
    """Verdict on integer products."""
    scale = facts.option("scale")
    if OUTPUTS.get(scale) is not facts.option("output"):  # type: ignore[call-overload]
        return "its kernel gives bf16 with bf16 scales, fp16 with fp32 ones"
    if facts.option("per_token_scale") is torch.float64:
        return "no fp64 scale"
    return npu.declines(facts, (torch.int8,))


def supports_weight_quant(facts: Facts) -> str | None:
    """Verdict on products with 8-bit weights."""
    if facts.dtype is torch.float16 and facts.option("bias") is torch.float32:
        return "no fp32 bias beside fp16"
    return npu.declines(facts, LOW_PRECISION)


def _list(tensor: Tensor | None) -> list[Tensor] | None:
    return None if tensor is None else [tensor.contiguous()]
