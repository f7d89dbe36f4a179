"""The merge by torch_npu's ring attention update.

The kernel works row by row, so every layout is brought to its form [rows, batch, heads * channels]
without moving an output: what is not "sbhd" becomes one batch. The packed form is not asked for:
its documents disagree on how lengths are listed, and it takes multiples of 64 channels only.
Statistics cross as the pair (lse, 1). Rows without any key, on which the kernel divides by zero,
are written by us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import npu
from ...registry import Backend, Kernel
from ..layout import PACKED
from . import reference

STATS = 8  # The kernel takes eight copies of each statistic.


def forward(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as the reference does."""
    if 0 in (out1.numel(), lse1.numel()):
        return reference.forward(out1, lse1, out2, lse2, layout)
    outs = [_rows(out.to(out1.dtype), layout) for out in (out1, out2)]
    tops = [_copies(lse, layout) for lse in (lse1, lse2)]
    ones = torch.ones_like(tops[0])
    out, top, total = npu.op("npu_ring_attention_update")(
        outs[0], tops[0], ones, outs[1], tops[1], ones, input_layout="SBH"
    )
    lse = _heads_first(top[..., 0] + total[..., 0].log(), lse1.shape, layout)
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    order = reference.ORDERS.get(layout)
    blank = (empty if order is None else empty.permute(order)).unsqueeze(-1)
    return out.view(out1.shape).masked_fill(blank, 0.0), lse.masked_fill(empty, -torch.inf)


def _rows(out: Tensor, layout: str) -> Tensor:
    """Return [rows, batch, heads * channels] of any layout."""
    if layout == "sbhd":
        return out.flatten(2).contiguous()
    width = out.shape[-1] * (1 if layout == "bhsd" else out.shape[-2])
    return out.reshape(-1, 1, width).contiguous()


def _copies(lse: Tensor, layout: str) -> Tensor:
    """Return [batch, heads, rows, 8] that belongs to these rows."""
    if layout == "sbhd":
        rows = lse
    elif layout == "bhsd":
        rows = lse.reshape(1, 1, -1)
    elif layout == PACKED:
        rows = lse.t().unsqueeze(0)
    else:
        rows = lse.transpose(0, 1).reshape(1, lse.shape[1], -1)
    return rows.unsqueeze(-1).expand(*rows.shape, STATS).contiguous()


def _heads_first(rows: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """Invert the order of `_copies`."""
    if layout == PACKED:
        return rows.squeeze(0).t().contiguous()
    if layout == "bshd":
        return rows.view(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()
    return rows.reshape(shape)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"attention_merge": Kernel(forward, reference.backward, npu.declines)},
    npu.available,
)
