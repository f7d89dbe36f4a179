"""Matrix products of groups and into accumulators on torch's own kernels.

With the ends of the groups on the host, groups of one size are one batched product. On CUDA
torch's grouped product takes the ends from the device, for bf16 and aligned widths. Everything else
is one product a group, written in place; that reads the ends, which waits for a device. torch has a
grouped product for the CPU too, but where there were many groups its weight gradient took longer
than the loop. `grouped_matmul_add_` always reads the ends: torch has no grouped product
that adds to fp32 what it computed from 16-bit inputs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
from .ffn import compose
from .quant import activate
from .weight_quant import matrices

_grouped_mm = getattr(torch, "_grouped_mm", None)
_ALIGNMENT = 16
# Whether torch multiplies 16-bit matrices into an fp32 one without rounding the product.
wide_product = "dtype_out" in torch.ops.aten.addmm.overloads()


def add(acc: Tensor, x: Tensor, dy: Tensor) -> None:
    """Add dy^T x to acc in acc's precision."""
    if acc.dtype == x.dtype:
        acc.addmm_(dy.t(), x)
    elif acc.device.type == "cuda" and wide_product:
        torch.addmm(acc, dy.t(), x, out_dtype=acc.dtype, out=acc)
    else:
        acc.addmm_(dy.t().to(acc.dtype), x.to(acc.dtype))


def grouped_add(acc: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    """Add x^T dy of each group of rows to acc[e]; empty groups cost nothing."""
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if end > start:
            add(acc[group], dy[start:end], x[start:end])


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x_e W_e + bias_e for each group of rows."""
    matrices = weight.transpose(1, 2) if transposed else weight
    y = _multiply(x, matrices, offsets)
    if bias is None or not y.numel():
        return y
    rows = bias.repeat_interleave(_sizes(offsets).to(bias.device), 0, output_size=y.shape[0])
    return y.add_(rows) if bias.dtype == y.dtype else (y + rows).to(y.dtype)


def backward(dy: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Return the gradient of the weights; zero for an empty group."""
    first, last = (dy, x) if transposed else (x, dy)
    groups, rows = offsets.shape[0], x.shape[0]
    if _batched(offsets, rows):
        batch = (groups, rows // groups, -1)
        return torch.bmm(first.reshape(batch).transpose(1, 2), last.reshape(batch))
    dweight = x.new_empty((groups, first.shape[1], last.shape[1]))
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if end > start:
            torch.mm(first[start:end].t(), last[start:end], out=dweight[group])
        else:
            dweight[group].zero_()
    return dweight


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
    """Return the scaled integer products, one product a group."""
    y = x.new_empty((x.shape[0], weight.shape[2]), dtype=output_dtype)
    dtype = compute_dtype(scale.dtype)
    for group, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if end == start:
            continue
        sums = _integer_product(x[start:end], weight[group])
        if bias is not None:
            sums = sums + bias[group]
        block = sums.to(dtype).mul_(scale[group])
        if per_token_scale is not None:
            block.mul_(per_token_scale[start:end].unsqueeze(1))
        y[start:end] = activate(block, activation)
    return y


def weight_quant(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    weight_offset: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return x_e W_e + bias_e with the matrices that 8-bit weights stand for."""
    return forward(x, matrices(weight, scale, weight_offset), offsets, bias, False)


def weight_quant_backward(
    dy: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, weight_offset: Tensor | None
) -> Tensor:
    """Return the gradient of the rows."""
    return forward(dy, matrices(weight, scale, weight_offset), offsets, None, True)


def _integer_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return the exact product of 8-bit integers."""
    if rows.device.type == "cpu" and rows.shape[1] and matrix.shape[1]:
        return torch._int_mm(rows.contiguous(), matrix.contiguous())
    # Every sum of products of 8-bit integers is exact in fp64, on every device that has it.
    return (rows.double() @ matrix.double()).to(torch.int32)


def _multiply(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    groups, rows = matrices.shape[0], x.shape[0]
    if _batched(offsets, rows):
        batch = x.reshape(groups, rows // groups, -1)
        return torch.bmm(batch, matrices).view(rows, -1)
    if rows and _grouped(x, matrices):
        return _call(x.contiguous(), _aligned(matrices), offsets)
    y = x.new_empty((rows, matrices.shape[2]))
    for matrix, (start, end) in zip(matrices, pairwise([0, *offsets.tolist()]), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix, out=y[start:end])
    return y


def _batched(offsets: Tensor, rows: int) -> bool:
    """Whether all groups have one size, as far as that is known on the host."""
    groups = offsets.shape[0]
    if offsets.device.type != "cpu" or not groups or not rows or rows % groups:
        return False
    size = rows // groups
    return bool(offsets.tolist() == list(range(size, rows + 1, size)))


def _grouped(x: Tensor, matrices: Tensor) -> bool:
    """Whether torch's grouped product takes rows of these widths, dtype and device."""
    if _grouped_mm is None or x.device.type != "cuda" or x.dtype is not torch.bfloat16:
        return False
    widths = (x.shape[1], matrices.shape[2])
    aligned = all(width and width * x.element_size() % _ALIGNMENT == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x.device)[0] >= 8


def _aligned(matrices: Tensor) -> Tensor:
    """Return the matrices row-major or column-major, as the grouped product takes them."""
    plain = matrices.is_contiguous() or matrices.transpose(1, 2).is_contiguous()
    return matrices if plain else matrices.contiguous()


def _call(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    ends = offsets.to(a.device, torch.int32, non_blocking=True)
    y: Tensor = _grouped_mm(a, b, offs=ends)  # type: ignore[misc]
    return y


def _sizes(offsets: Tensor) -> Tensor:
    return torch.diff(offsets, prepend=offsets.new_zeros(1))


BACKEND = Backend(
    "portable",
    90,
    {
        "matmul_add_": Kernel(add),
        "grouped_matmul_add_": Kernel(grouped_add),
        "ffn": Kernel(compose),
        "grouped_matmul": Kernel(forward, backward),
        "quant_grouped_matmul": Kernel(quant),
        "weight_quant_grouped_matmul": Kernel(weight_quant, weight_quant_backward),
    },
)
