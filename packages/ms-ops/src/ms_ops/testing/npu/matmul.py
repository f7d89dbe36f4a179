"""torch_npu's grouped products and ATB's accumulation as documented: fp32 inside, rising ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .quant import Extra, integers, low_bit_weights, plain
from .require import need, need_contiguous

OP = "npu_grouped_matmul"
LOW = (torch.float16, torch.bfloat16)


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **given: Any,
) -> list[Tensor]:
    """Split the rows (group_type 0) or the inner dimension (2), with one output."""
    need(OP, len(x) == len(weight) == 1 and split_item == 3, "one x, one weight, split_item 3")
    need(OP, group_type in (0, 2) and group_list is not None, "group_type 0 or 2 with a list")
    assert group_list is not None
    groups = group_list.shape[0]
    need(OP, group_list.dtype is torch.int64 and 1 < groups <= 1024, "2 to 1024 int64 groups")
    rows, columns = x[0].shape[0], weight[0].shape[-1]
    shape = [rows, columns] if group_type == 0 else [groups, rows, columns]
    kind = _kind(x[0], weight[0], group_type == 0)
    extra = kind(x[0], weight[0], {n: v for n, v in given.items() if v is not None and v != 0})
    y = x[0].new_empty(shape, dtype=extra.output)
    if y.device.type == "cpu":
        ends = group_list.tolist() if group_list_type == 0 else group_list.cumsum(0).tolist()
        total = rows if group_type == 0 else x[0].shape[1]
        need(OP, ends[-1] == total and ends == sorted(ends), "ends that rise to all rows")
        if group_type == 0:
            y.copy_(_by_rows(x[0], weight[0], ends, extra))
        else:
            y.copy_(_by_inner(x[0].float(), weight[0].float(), ends))
    return [y]


def _kind(x: Tensor, weight: Tensor, by_rows: bool) -> Callable[..., Extra]:
    if x.dtype is torch.int8:
        need(OP, by_rows, "group_type 0 with integers")
        return integers
    if weight.dtype is torch.int8:
        need(OP, by_rows, "group_type 0 with 8-bit weights")
        return low_bit_weights
    return plain


def _by_rows(x: Tensor, weight: Tensor, ends: list[int], extra: Extra) -> Tensor:
    need(OP, weight.dim() == 3 and weight.shape[0] == len(ends), "a matrix for each group")
    spans, wide = list(pairwise([0, *ends])), extra.matrices(weight)
    parts = [x[a:b].to(wide.dtype) @ w for (a, b), w in zip(spans, wide, strict=True)]
    if extra.bias is not None:
        need(OP, extra.bias.shape == (weight.shape[0], weight.shape[2]), "a bias for each column")
        parts = [p + b for p, b in zip(parts, extra.bias, strict=True)]
    return extra.scaled(parts)


def _by_inner(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    need(OP, x.t().is_contiguous(), "x a transposed view")
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


def addmm_into_fp32(
    total: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    """torch's product of 16-bit matrices into fp32, which has no kernel for the CPU."""
    op = "addmm.dtype_out"
    need(op, a.dtype in LOW and a.dtype == b.dtype, "16-bit operands of one dtype")
    need(op, total.dtype == out.dtype == out_dtype == torch.float32, "an fp32 sum")
    return out.copy_(beta * total + alpha * (a.float() @ b.float()))


# Operators of torch itself that torch_npu has a kernel for, and the CPU none.
TORCHS = {"aten::addmm.dtype_out": addmm_into_fp32}
KERNELS = {
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_grouped_matmul_add_": grouped_matmul_add,
    "atb::_npu_matmul_add_fp32": matmul_add,
}
