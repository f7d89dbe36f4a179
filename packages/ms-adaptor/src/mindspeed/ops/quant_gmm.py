"""`npu_quant_gmm`, `npu_quant_gmm_v2`: grouped products of 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ms_ops
from ms_ops.checks import check_choice, check_tensor, fail

# The numbers of the kernel; 3 is no activation that it has.
ACTIVATIONS = {0: "none", 1: "relu", 2: "gelu_tanh", 4: "fast_gelu", 5: "silu"}


def npu_quant_gmm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
    act_type: int = 0,
) -> Tensor:
    """Return act((x W + bias) * scale * per_token_scale), see `ms_ops.quant_grouped_matmul`.

    Args:
        x: [T, K] int8.
        weight: [E, K, N] int8.
        scale: [E, N], bf16 or fp32.
        offset: refused: no kernel reads it.
        per_token_scale: [T] fp32.
        bias: [E, N] int32.
        group_list: [E], the row at which each group ends.
        output_dtype: fp16 or bf16; must be given, because its default differs between what the
            old code and its page say.
        act_type: 0 none, 1 relu, 2 gelu (tanh), 4 fast gelu, 5 silu; other than 0 only with
            per_token_scale.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not match, an unknown number, no output_dtype.
    """
    check_options("npu_quant_gmm", offset, per_token_scale, output_dtype, act_type)
    return ms_ops.quant_grouped_matmul(
        x,
        weight,
        scale,
        group_list,
        output_dtype=output_dtype or x.dtype,
        per_token_scale=per_token_scale,
        bias=bias,
        activation=ACTIVATIONS[act_type],
    )


def npu_quant_gmm_v2(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    act_type: int = 0,
) -> Tensor:
    """Do what `npu_quant_gmm` does with the number of rows of each group in `group_list`."""
    check_tensor("npu_quant_gmm_v2", "group_list", group_list)
    check_options("npu_quant_gmm_v2", offset, per_token_scale, output_dtype, act_type)
    return ms_ops.quant_grouped_matmul(
        x,
        weight,
        scale,
        group_sizes=group_list,
        output_dtype=output_dtype or x.dtype,
        per_token_scale=per_token_scale,
        bias=bias,
        activation=ACTIVATIONS[act_type],
    )


def check_options(
    op: str,
    offset: Tensor | None,
    per_token_scale: Tensor | None,
    output_dtype: torch.dtype | None,
    act_type: int,
) -> None:
    """Raise ValueError for what the kernel refuses."""
    check_choice(op, "act_type", act_type, tuple(ACTIVATIONS))
    check_choice(op, "output_dtype", output_dtype, (torch.float16, torch.bfloat16))
    if offset is not None:
        fail(ValueError, op, "offset", "a tensor", "None")
    if act_type and per_token_scale is None:
        fail(ValueError, op, "act_type", act_type, "0 without per_token_scale")
