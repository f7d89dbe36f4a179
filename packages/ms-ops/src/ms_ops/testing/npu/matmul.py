"""torch_npu's grouped products and ATB's accumulation as documented: fp32 inside, rising ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .require import need, need_contiguous, need_dtypes

OP = "npu_grouped_matmul"
LOW = (torch.float16, torch.bfloat16)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **given: Any,
) -> list[Tensor]:
    """Split the rows (group_type 0) or the inner dimension (2), with one output."""
    need(OP, len(x) == len(weight) == 1 and split_item == 3, "one x, one weight, split_item 3")
    need(OP, group_type in (0, 2) and group_list is not None, "group_type 0 or 2 with a list")
    need(OP, all(v is None or v == 0 for v in given.values()), "no quantisation")
    need_dtypes(OP, x[0], weight[0])
    assert group_list is not None
    groups = group_list.shape[0]
    need(OP, group_list.dtype is torch.int64 and 1 < groups <= 1024, "2 to 1024 int64 groups")
    rows, columns = x[0].shape[0], weight[0].shape[-1]
    shape = [rows, columns] if group_type == 0 else [groups, rows, columns]
    y = x[0].new_empty(shape)
    if y.device.type == "cpu":
        parts = _by_rows if group_type == 0 else _by_inner
        ends = group_list.tolist() if group_list_type == 0 else group_list.cumsum(0).tolist()
        total = rows if group_type == 0 else x[0].shape[1]
        need(OP, ends[-1] == total and ends == sorted(ends), "ends that rise to all rows")
        y.copy_(parts(x[0].float(), weight[0].float(), ends, _bias(bias, x[0])))
    return [y]


def _bias(bias: Sequence[Tensor] | None, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    wanted = torch.float16 if x.dtype is torch.float16 else torch.float32
    need(OP, bias[0].dtype is wanted, f"bias {wanted}")
    return bias[0].float()


def _by_rows(x: Tensor, weight: Tensor, ends: list[int], bias: Tensor | None) -> Tensor:
    need(OP, weight.dim() == 3 and weight.shape[0] == len(ends), "a matrix for each group")
    parts = [x[a:b] @ w for (a, b), w in zip(pairwise([0, *ends]), weight, strict=True)]
    if bias is not None:
        parts = [p + b for p, b in zip(parts, bias, strict=True)]
    return torch.cat(parts)


def _by_inner(x: Tensor, weight: Tensor, ends: list[int], bias: Tensor | None) -> Tensor:
    need(OP, x.t().is_contiguous() and bias is None, "x a transposed view, no bias")
    return torch.stack([x[:, a:b] @ weight[a:b] for a, b in pairwise([0, *ends])])


def grouped_matmul_add(
    total: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int = 0,
) -> Tensor:
    """Add in place. The kind of the list is ignored, as by the kernel's first version."""
    op = "npu_grouped_matmul_add_"
    need(op, total.dtype is torch.float32 and total.dim() == 3, "an fp32 accumulator [E, K, N]")
    need(op, x.dtype in LOW and x.dtype == weight.dtype, "fp16 or bf16 operands")
    need(op, transpose_x and not transpose_weight and group_type == 2, "x transposed, type 2")
    need_contiguous(op, total, x, weight)
    if total.device.type == "cpu":
        spans = pairwise([0, *group_list.tolist()])
        for part, (start, end) in zip(total, spans, strict=True):
            part += x[start:end].float().t() @ weight[start:end].float()
    return total


def matmul_add(x: Tensor, weight: Tensor, c: Tensor) -> None:
    """Add x^T weight to c in place."""
    op = "_npu_matmul_add_fp32"
    need(op, c.dtype is torch.float32 and x.dtype in LOW, "an fp32 accumulator, 16-bit operands")
    need(op, x.dtype == weight.dtype, "operands of one dtype")
    need_contiguous(op, x, weight, c)
    if c.device.type == "cpu":
        c += x.float().t() @ weight.float()


KERNELS = {
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_grouped_matmul_add_": grouped_matmul_add,
    "atb::_npu_matmul_add_fp32": matmul_add,
}
