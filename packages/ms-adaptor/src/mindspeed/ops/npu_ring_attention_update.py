"""`npu_ring_attention_update`: join two partial attention results with their statistics."""

from __future__ import annotations

import torch
from torch import Tensor

import ms_ops
from ms_ops.checks import check_choice, check_tensor, fail

OP = "npu_ring_attention_update"


def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None = None,
    layout: str = "SBH",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (attn_out, softmax_max, softmax_sum) over the keys of both results.

    Args:
        prev_attn_out: SBH [S, B, N * D] or TND [T, N, D].
        prev_softmax_max: fp32, SBH [B, N, S, 8] or TND [T, N, 8], the eight last numbers equal.
        prev_softmax_sum: likewise.
        cur_attn_out: like the first.
        cur_softmax_max: like the second.
        cur_softmax_sum: likewise.
        actual_seq_qlen: ends of the packed sequences; needed with TND, as the kernel demands it,
            but not read: each row of a statistic belongs to its own token.
        layout: "SBH" or "TND".

    Returns:
        The output in its own dtype, rounded once, and its statistics. Rows that see no key in
        either result give output 0, maximum -inf and sum 0.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not fit, or TND without lengths.
    """
    check_choice(OP, "layout", layout, ("SBH", "TND"))
    _check(prev_attn_out, layout, actual_seq_qlen)
    stats = (prev_softmax_max, prev_softmax_sum, cur_softmax_max, cur_softmax_sum)
    for name, stat in zip(("prev max", "prev sum", "cur max", "cur sum"), stats, strict=True):
        check_tensor(OP, name, stat)
        if stat.dtype is not torch.float32 or stat.shape[-1:] != (8,):
            got = f"{stat.dtype} {tuple(stat.shape)}"
            fail(ValueError, OP, name, got, "torch.float32 with 8 numbers last")
    rows = [stat[..., 0] for stat in stats]
    outs = [prev_attn_out, cur_attn_out]
    if layout == "SBH":
        outs = [out.unflatten(-1, (prev_softmax_max.shape[1], -1)) for out in outs]
    sums = [top + total.log() for top, total in ((rows[0], rows[1]), (rows[2], rows[3]))]
    kind = "sbhd" if layout == "SBH" else "thd"
    out, _ = ms_ops.attention_merge(outs[0], sums[0], outs[1], sums[1], layout=kind)
    top = torch.maximum(rows[0], rows[2])
    level = top.masked_fill(top == -torch.inf, 0.0)
    parts = (rows[1] * torch.exp(rows[0] - level), rows[3] * torch.exp(rows[2] - level))
    wide = [t.unsqueeze(-1).expand(*t.shape, 8).contiguous() for t in (top, parts[0] + parts[1])]
    return out.flatten(2) if layout == "SBH" else out, wide[0], wide[1]


def _check(out: Tensor, layout: str, lengths: Tensor | None) -> None:
    check_tensor(OP, "prev_attn_out", out)
    if out.dim() != 3:
        fail(ValueError, OP, "prev_attn_out", f"{out.dim()} dimensions", "3")
    if layout == "TND" and lengths is None:
        fail(ValueError, OP, "actual_seq_qlen", None, "the ends of the sequences with TND")
