"""Matrix products of groups and into accumulators in plain torch: the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel
from .ffn import GATED, PLAIN
from .quant import activate
from .weight_quant import matrices


def add(acc: Tensor, x: Tensor, dy: Tensor) -> None:
    """Add dy^T x to acc."""
    acc += dy.to(acc.dtype).t() @ x.to(acc.dtype)


def grouped_add(acc: Tensor, x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    """Add x^T dy of each group of rows to acc[e]."""
    for group, (rows, grads) in enumerate(zip(parts(x, offsets), parts(dy, offsets), strict=True)):
        acc[group] += rows.to(acc.dtype).t() @ grads.to(acc.dtype)


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x_e W_e + bias_e for each group of rows, summed in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    matrices = weight.transpose(1, 2) if transposed else weight
    blocks = [
        rows.to(dtype) @ matrix.to(dtype)
        for rows, matrix in zip(parts(x, offsets), matrices, strict=True)
    ]
    if bias is not None:
        blocks = [block + row.to(dtype) for block, row in zip(blocks, bias, strict=True)]
    empty = x.new_zeros((0, matrices.shape[2]), dtype=dtype)
    return torch.cat([empty, *blocks]).to(x.dtype)


def backward(dy: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Return the gradient of the weights; zero for an empty group."""
    dtype = compute_dtype(x.dtype)
    first, last = (dy, x) if transposed else (x, dy)
    products = [
        a.to(dtype).t() @ b.to(dtype)
        for a, b in zip(parts(first, offsets), parts(last, offsets), strict=True)
    ]
    shape = (0, first.shape[1], last.shape[1])
    return torch.cat([x.new_zeros(shape, dtype=dtype), *(p[None] for p in products)]).to(x.dtype)


def ffn(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    ends: Tensor | None,
    bias1: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    """Return act(x W1 + b1) W2 + b2 of each group; the activation is rounded to x's dtype."""
    rows, wide = x.reshape(-1, x.shape[-1]), compute_dtype(x.dtype)
    ends = torch.tensor([rows.shape[0]]) if ends is None else ends
    one, two = (w.reshape(-1, *w.shape[-2:]).to(wide) for w in (weight1, weight2))
    b1, b2 = (None if b is None else b.reshape(-1, b.shape[-1]) for b in (bias1, bias2))
    hidden = (PLAIN | GATED)[activation](forward(rows.to(wide), one, ends, b1, False))
    out = forward(hidden.to(x.dtype).to(wide), two, ends, b2, False).to(x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


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
    """Return act((x_e W_e + bias_e) * scale_e * per_token_scale) with sums in 64-bit integers."""
    dtype = compute_dtype(scale.dtype)
    blocks = []
    for group, rows in enumerate(parts(x, offsets)):
        sums = rows.long() @ weight[group].long()
        sums = sums if bias is None else sums + bias[group]
        blocks.append(sums.to(dtype) * scale[group].to(dtype))
    y = torch.cat([x.new_zeros((0, weight.shape[2]), dtype=dtype), *blocks])
    if per_token_scale is not None:
        y = y * per_token_scale.to(dtype).unsqueeze(1)
    return activate(y, activation).to(output_dtype)


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


def parts(rows: Tensor, offsets: Tensor) -> Iterator[Tensor]:
    """Yield the rows of each group."""
    start = 0
    for end in offsets.tolist():
        yield rows[start:end]
        start = end


BACKEND = Backend(
    "reference",
    100,
    {
        "matmul_add_": Kernel(add),
        "grouped_matmul_add_": Kernel(grouped_add),
        "ffn": Kernel(ffn),
        "grouped_matmul": Kernel(forward, backward),
        "quant_grouped_matmul": Kernel(quant),
        "weight_quant_grouped_matmul": Kernel(weight_quant, weight_quant_backward),
    },
)
