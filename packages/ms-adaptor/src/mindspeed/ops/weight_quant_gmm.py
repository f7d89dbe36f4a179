"""`npu_weight_quant_gmm`, `npu_weight_quant_gmm_v2`: grouped products with 8-bit weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import ms_ops
from ms_ops.checks import check_choice, check_tensor


def npu_weight_quant_gmm(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    *,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    act_type: int = 0,
) -> Tensor:
    """Return x ((W + offset) * scale) + bias, see `ms_ops.weight_quant_grouped_matmul`.

    Args:
        x: [T, K], fp16 or bf16.
        weight: [E, K, N] int8.
        antiquant_scale: [E, N] in x's dtype.
        antiquant_offset: [E, N] in x's dtype.
        bias: [E, N] in x's dtype or fp32.
        group_list: [E], the row at which each group ends.
        act_type: 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not match, another act_type.
    """
    check_choice("npu_weight_quant_gmm", "act_type", act_type, (0,))
    return ms_ops.weight_quant_grouped_matmul(
        x, weight, antiquant_scale, group_list, weight_offset=antiquant_offset, bias=bias
    )


def npu_weight_quant_gmm_v2(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    *,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    group_list: Tensor | None = None,
    act_type: int = 0,
) -> Tensor:
    """Do what `npu_weight_quant_gmm` does with the rows of each group in `group_list`."""
    op = "npu_weight_quant_gmm_v2"
    check_choice(op, "act_type", act_type, (0,))
    check_tensor(op, "group_list", group_list)
    return ms_ops.weight_quant_grouped_matmul(
        x,
        weight,
        antiquant_scale,
        group_sizes=group_list,
        weight_offset=antiquant_offset,
        bias=bias,
    )
