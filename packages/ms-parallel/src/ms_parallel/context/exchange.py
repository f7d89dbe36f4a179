"""Tokens for heads: the exchange of a group, for any lengths and numbers of heads.

Before it, a rank holds some tokens with all heads; after it, all tokens with some of the heads.
One all-to-all with split sizes moves everything; ranks whose ranges of heads overlap each get a
copy, and the way back adds the copies up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ms_ops.checks import fail

from .heads import Interval
from .topology import group_name, group_of

Restore = Callable[[Tensor], Tensor]


def seq_to_head(
    x: Tensor,
    group: Any,
    seq_dim: int,
    head_dim: int,
    seq_lens: Sequence[int] | None = None,
    head_counts: Sequence[int | Interval] | None = None,
) -> Tensor:
    """Trade tokens for heads: return all tokens with this rank's heads.

    The sequence is rank after rank. Differentiable; works under torch.compile. Any dtype.

    Args:
        x: this rank's tokens with all heads, contiguous or not.
        group: process group of the ranks that exchange.
        seq_dim: dimension of the tokens.
        head_dim: dimension of the heads.
        seq_lens: tokens of every rank; all as many as this one when None.
        head_counts: heads of every rank, or ranges [first, last) which may overlap
            (`kv_head_plan`): the gradient of a head that several ranks get is the sum of theirs.
            As even as can be when None, the first ranks one more.

    Raises:
        ValueError: lengths that do not fit `x`, or heads out of range.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    lens = _lengths("seq_to_head", x.shape[seq_dim], size, me, seq_lens)
    ranges = _ranges("seq_to_head", x.shape[head_dim], size, head_counts)
    rows, restore = _rows_first(x, seq_dim, head_dim)
    spread = [b - a for a, b in ranges]
    inner = rows.shape[1] * rows.shape[3]
    sent = [rows.shape[0] * inner * n for n in spread]
    received = [n * inner * spread[me] for n in lens]
    pieces = [rows[:, :, a:b].reshape(-1) for a, b in ranges]
    flat = _swap(torch.cat(pieces), received, sent, group_name(group))
    return restore(flat.view(sum(lens), rows.shape[1], spread[me], rows.shape[3]))


def head_to_seq(
    x: Tensor,
    group: Any,
    seq_dim: int,
    head_dim: int,
    seq_lens: Sequence[int] | None = None,
    head_counts: Sequence[int | Interval] | None = None,
) -> Tensor:
    """Invert `seq_to_head`: return this rank's tokens with all heads.

    Heads that several ranks hold (overlapping ranges) are summed.

    Args:
        x: all tokens with this rank's heads.
        group: process group of the ranks that exchange.
        seq_dim: dimension of the tokens.
        head_dim: dimension of the heads.
        seq_lens: tokens of every rank; as even as can be when None, the first ranks one more.
        head_counts: as in `seq_to_head`; all as many as this rank when None.

    Raises:
        ValueError: lengths or heads that do not fit `x`.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    heads = x.shape[head_dim]
    ranges = _ranges("head_to_seq", heads * size, size, head_counts)
    if ranges[me][1] - ranges[me][0] != heads:
        fail(ValueError, "head_to_seq", "x", f"{heads} heads", f"those of the range {ranges[me]}")
    lens = _even(x.shape[seq_dim], size) if seq_lens is None else list(seq_lens)
    if len(lens) != size or sum(lens) != x.shape[seq_dim]:
        need = f"{size} numbers with the sum {x.shape[seq_dim]}, the tokens of x"
        fail(ValueError, "head_to_seq", "seq_lens", lens, need)
    rows, restore = _rows_first(x, seq_dim, head_dim)
    inner = rows.shape[1] * rows.shape[3]
    sent = [n * inner * heads for n in lens]
    received = [lens[me] * inner * (b - a) for a, b in ranges]
    flat = _swap(rows.reshape(-1), received, sent, group_name(group))
    shape = (lens[me], rows.shape[1], -1, rows.shape[3])
    pieces = flat.split(received)
    total = max(b for _, b in ranges)
    if sum(b - a for a, b in ranges) == total:
        parts = [
            p.view(shape[0], shape[1], b - a, shape[3])
            for p, (a, b) in zip(pieces, ranges, strict=True)
        ]
        return restore(torch.cat(parts, 2))
    whole = flat.new_zeros((shape[0], shape[1], total, shape[3]))
    for piece, (a, b) in zip(pieces, ranges, strict=True):
        part = piece.view(shape[0], shape[1], b - a, shape[3])
        whole = whole + torch.nn.functional.pad(part, (0, 0, a, total - b))
    return restore(whole)


def _lengths(op: str, own: int, size: int, me: int, lens: Sequence[int] | None) -> list[int]:
    found = [own] * size if lens is None else list(lens)
    if len(found) != size or found[me] != own:
        need = f"{size} numbers, that of rank {me} being {own}, the tokens of x"
        fail(ValueError, op, "seq_lens", found, need)
    return found


def _ranges(
    op: str, heads: int, size: int, given: Sequence[int | Interval] | None
) -> list[Interval]:
    counts = _even(heads, size) if given is None else given
    if len(counts) != size:
        fail(ValueError, op, "head_counts", list(counts), f"{size} numbers, one a rank")
    ranges: list[Interval] = []
    at = 0
    for count in counts:
        a, b = (at, at + count) if isinstance(count, int) else count
        ranges.append((a, b))
        at = b
    covered = sorted(ranges)
    reach = 0
    for a, b in covered:
        if a > reach or b < a or (op == "seq_to_head" and b > heads):
            fail(ValueError, op, "head_counts", list(counts), f"ranges that cover {heads} heads")
        reach = max(reach, b)
    if op == "seq_to_head" and reach != heads:
        fail(ValueError, op, "head_counts", list(counts), f"ranges that cover {heads} heads")
    return ranges


def _even(total: int, size: int) -> list[int]:
    return [total // size + (i < total % size) for i in range(size)]


def _rows_first(x: Tensor, seq_dim: int, head_dim: int) -> tuple[Tensor, Restore]:
    """View `x` as [tokens, before, heads, after], and say how to come back."""
    seq_dim, head_dim = seq_dim % x.dim(), head_dim % x.dim()
    if seq_dim == head_dim:
        fail(ValueError, "seq_to_head", "head_dim", head_dim, "another dimension than seq_dim")
    others = [i for i in range(x.dim()) if i not in (seq_dim, head_dim)]
    before = [i for i in others if i < head_dim]
    after = [i for i in others if i > head_dim]
    order = [seq_dim, *before, head_dim, *after]
    moved = x.permute(order)
    sizes = list(moved.shape)
    split = 1 + len(before)
    shape = (sizes[0], prod(sizes[1:split]), sizes[split], prod(sizes[split + 1 :]))
    rows = moved.reshape(shape)

    def restore(y: Tensor) -> Tensor:
        shape = [y.shape[0], *sizes[1:split], y.shape[2], *sizes[split + 1 :]]
        return y.reshape(shape).permute([order.index(i) for i in range(x.dim())]).contiguous()

    return rows, restore


@torch.library.custom_op("ms_parallel::all_to_all", mutates_args=())
def _swap(flat: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    out = flat.new_empty(sum(received))
    # gloo has no bool; bytes are bytes.
    raw, into = (t.view(torch.uint8) if t.dtype is torch.bool else t for t in (flat, out))
    dist.all_to_all_single(into, raw.contiguous(), received, sent, group=group_of(group))
    return out


@_swap.register_fake
def _(flat: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return flat.new_empty(sum(received))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.received, ctx.sent, ctx.group = inputs


def _swap_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _swap(grad.contiguous(), ctx.sent, ctx.received, ctx.group), None, None, None


_swap.register_autograd(_swap_back, setup_context=_keep)

__all__ = ["head_to_seq", "seq_to_head"]
