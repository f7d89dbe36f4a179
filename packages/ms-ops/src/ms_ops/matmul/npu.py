"""Grouped products by torch_npu's kernels, accumulation by ATB's.

The kernel takes the ends of the groups from the device: nothing waits. A list of one group is
illegal there, one group is a plain product. `matmul_add_` of 16-bit inputs is ATB's accumulation,
which comes with Ascend's NNAL package; without it torch's product of 16-bit matrices that is added
to fp32; and where torch is too old for that, a product of fp32 copies.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import npu
from ..registry import Backend, Facts, Kernel
from . import npu_ffn, npu_quant, portable
from .npu_groups import ends_on, serves
from .weight_quant import matrices

# Where ATB's package says that it is installed.
ATB = "ATB_HOME_PATH"


def add(acc: Tensor, x: Tensor, dy: Tensor) -> None:
    """Add dy^T x to acc in acc's precision."""
    if acc.dtype == x.dtype or 0 in (x.numel(), dy.numel()):
        portable.add(acc, x, dy)
    elif os.environ.get(ATB):
        torch.ops.atb._npu_matmul_add_fp32(dy.contiguous(), x.contiguous(), acc)
    elif portable.wide_product:
        torch.addmm(acc, dy.t(), x, out_dtype=acc.dtype, out=acc)
    else:
        portable.add(acc, x, dy)


def grouped_add(acc: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    """Add x^T dy of each group of rows to acc[e]."""
    if 0 in (x.numel(), dy.numel()):
        return
    if offsets.shape[0] == 1:
        add(acc[0], dy, x)
        return
    if acc.dtype == x.dtype:
        acc.add_(backward(dy, x, offsets, False))
        return
    # Ends only: some versions of the kernel ignore the kind of the list.
    npu.op("npu_grouped_matmul_add_")(
        acc, x.contiguous(), dy.contiguous(), ends_on(offsets, x),
        transpose_x=True, transpose_weight=False, group_type=2, group_list_type=0,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x_e W_e + bias_e for each group of rows."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if offsets.shape[0] == 1:
        return torch.mm(x, matrices[0]) if bias is None else torch.addmm(bias.to(x), x, matrices[0])
    if bias is None and 0 in (x.numel(), matrices.numel()):
        return x.new_zeros((x.shape[0], matrices.shape[2]))
    if not serves(x, matrices, offsets):
        return portable.forward(x, weight, offsets, bias, transposed)
    if not (matrices.is_contiguous() or matrices.transpose(1, 2).is_contiguous()):
        matrices = matrices.contiguous()
    # The kernel adds fp16 to fp16, and fp32 to the rest.
    rows = None if bias is None else [bias if x.dtype is torch.float16 else bias.float()]
    y: Tensor = npu.op("npu_grouped_matmul")(
        [x.contiguous()], [matrices], bias=rows, group_list=ends_on(offsets, x),
        split_item=3, group_type=0, group_list_type=0,
    )[0]  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Return the gradient of the weights; zero for an empty group."""
    first, last = (dy, x) if transposed else (x, dy)
    if 0 in (x.numel(), dy.numel()):
        return x.new_zeros((offsets.shape[0], first.shape[1], last.shape[1]))
    if offsets.shape[0] == 1:
        return (first.t() @ last).unsqueeze(0)
    dweight: Tensor = npu.op("npu_grouped_matmul")(
        [first.contiguous().t()], [last.contiguous()], group_list=ends_on(offsets, x),
        split_item=3, group_type=2, group_list_type=0,
    )[0]  # fmt: skip
    return dweight


def _weight_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    weight_offset: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if offsets.shape[0] > 1 and serves(x, weight, offsets):
        return npu_quant.weight_quant(x, weight, scale, offsets, weight_offset, bias)
    return forward(x, matrices(weight, scale, weight_offset), offsets, bias, False)


def _weight_quant_backward(
    dy: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, weight_offset: Tensor | None
) -> Tensor:
    return forward(dy, matrices(weight, scale, weight_offset), offsets, None, True)


def _supports(facts: Facts) -> str | None:
    if facts.dtype is torch.float16 and facts.option("bias") is torch.float32:
        return "no fp32 bias beside fp16"
    return npu.declines(facts)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {
        "matmul_add_": Kernel(add, supports=npu.declines),
        "grouped_matmul_add_": Kernel(grouped_add, supports=npu.declines),
        "grouped_matmul": Kernel(forward, backward, _supports),
        "ffn": Kernel(npu_ffn.ffn, supports=npu_ffn.supports),
        "quant_grouped_matmul": Kernel(npu_quant.quant, supports=npu_quant.supports_quant),
        "weight_quant_grouped_matmul": Kernel(
            _weight_quant, _weight_quant_backward, npu_quant.supports_weight_quant
        ),
    },
    npu.available,
)
