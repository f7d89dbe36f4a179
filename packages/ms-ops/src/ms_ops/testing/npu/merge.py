"""torch_npu's update of ring attention as documented: max, sum and output of two parts.

Layout SBH has statistics [B, N, S, 8]; TND [T, N, 8], or a block [N, S, 8] a sequence where the
statistics' layout is not TND. Rows without any key in both parts divide 0 by 0, as there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layouts import COPIES, from_statistics, statistics
from .readings import reading
from .require import need, need_contiguous, need_dtypes

OP = "npu_ring_attention_update"


def update(
    prev_out: Tensor,
    prev_max: Tensor,
    prev_sum: Tensor,
    cur_out: Tensor,
    cur_max: Tensor,
    cur_sum: Tensor,
    *,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, max, sum) of both parts together."""
    tops, sums = (prev_max, cur_max), (prev_sum, cur_sum)
    _check(prev_out, cur_out, (*tops, *sums), input_layout)
    if prev_out.device.type != "cpu":
        return torch.empty_like(prev_out), torch.empty_like(prev_max), torch.empty_like(prev_sum)
    top = torch.maximum(*tops)
    parts = [s * torch.exp(t - top) for s, t in zip(sums, tops, strict=True)]
    total = parts[0] + parts[1]
    order = _weights(input_layout, input_softmax_layout, actual_seq_qlen, prev_out)
    heads = prev_max.shape[1]
    wide = [out.float().unflatten(-1, (heads, -1)) if input_layout == "SBH" else out.float()
            for out in (prev_out, cur_out)]  # fmt: skip
    out = wide[0] * order(parts[0] / total) + wide[1] * order(parts[1] / total)
    return out.to(prev_out.dtype).view(prev_out.shape), top, total


def _weights(
    layout: str, softmax_layout: str, ends: Tensor | None, out: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return a function that brings statistics to the order of the outputs."""
    if layout == "SBH":
        return lambda x: x[..., :1].permute(2, 0, 1, 3)
    assert ends is not None
    numbers: list[int] = ends.tolist()
    leading = numbers[:1] == [0]
    need(OP, leading == (reading().merge_ends == "from 0"), "lengths as this reading lists them")
    own = numbers[1:] if leading else numbers
    need(OP, own[-1] == out.shape[0] and own == sorted(own), "lengths that cover all tokens")

    def order(x: Tensor) -> Tensor:
        blocks = from_statistics(x.contiguous(), "TND", softmax_layout, (own, own))
        return statistics(blocks, "TND", "TND")[..., :1]

    return order


def _check(prev: Tensor, cur: Tensor, stats: tuple[Tensor, ...], layout: str) -> None:
    need_dtypes(OP, prev, cur)
    need_contiguous(OP, prev, cur, *stats)
    need(OP, layout in ("SBH", "TND"), "layout SBH or TND")
    need(OP, prev.dim() == 3 and prev.shape == cur.shape and prev.numel() > 0, "outputs alike")
    same = all(s.dtype is torch.float32 and s.shape == stats[0].shape for s in stats)
    need(OP, same and stats[0].shape[-1] == COPIES, "fp32 statistics with eight copies")
    heads = stats[0].shape[1]
    shape: tuple[int, ...]
    if layout == "SBH":
        shape = (prev.shape[1], heads, prev.shape[0], COPIES)
        fits = prev.shape[2] % heads == 0
    else:
        shape = (prev.shape[0], prev.shape[1], COPIES)
        fits = prev.shape[2] % 64 == 0 and prev.shape[2] <= 768 and heads <= 256
    need(OP, tuple(stats[0].shape) == shape and fits, f"statistics {shape}, channels by 64 for TND")


KERNELS = {"npu::npu_ring_attention_update": update}
