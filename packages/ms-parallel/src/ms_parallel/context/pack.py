"""What the places of a node send one another when they trade tokens for heads.

Before it, a place holds some tokens with all heads; after it, all tokens of the node, in its
order, with some of the heads. Tensors have rows first: [s, B, H, D]. Places whose ranges of heads
overlap each get a copy, and the way back adds the copies up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ms_ops.device import compute_dtype

from .heads import Interval

# (row at the node, row at the place, number of rows)
Move = tuple[int, int, int]


@dataclass(frozen=True)
class Places:
    """The tokens of a node's places, and where they stand in the node's order.

    Attributes:
        moves: for every place the runs of its rows.
        me: the place of this process.
    """

    moves: tuple[tuple[Move, ...], ...]
    me: int

    @property
    def counts(self) -> list[int]:
        """Number of tokens of every place."""
        return [sum(n for _, _, n in moves) for moves in self.moves]

    @property
    def in_order(self) -> bool:
        """Whether place after place is the order of the node."""
        at = [move for moves in self.moves for move in moves]
        return all(a[0] + a[2] == b[0] for a, b in pairwise(at))


def pack_heads(parts: Sequence[Tensor], ranges: Sequence[Sequence[Interval]]) -> Tensor:
    """Return what a place sends: for each place, of each tensor the heads that it gets.

    Args:
        parts: tensors [s, B, H, D] with their own numbers of heads and channels.
        ranges: for each of them the range of heads of every place.
    """
    pieces = [
        part[:, :, slice(*part_ranges[u])].reshape(-1)
        for u in range(len(ranges[0]))
        for part, part_ranges in zip(parts, ranges, strict=True)
    ]
    return torch.cat(pieces)


def unpack_heads(
    flat: Tensor, places: Places, rows: Sequence[tuple[int, int, int]]
) -> list[Tensor]:
    """Return the node's tensors [Sn, B, h, D] from what all places sent.

    Args:
        flat: place after place, of each tensor its tokens with this place's heads.
        places: whose tokens go where.
        rows: (B, h, D) of each tensor.
    """
    total = sum(places.counts)
    if len(rows) == 1 and places.in_order:
        return [flat.view(total, *rows[0])]
    out = [flat.new_empty((total, *row)) for row in rows]
    at = 0
    for moves, count in zip(places.moves, places.counts, strict=True):
        for whole, row in zip(out, rows, strict=True):
            size = count * row[0] * row[1] * row[2]
            piece = flat[at : at + size].view(count, *row)
            for there, here, n in moves:
                whole[there : there + n] = piece[here : here + n]
            at += size
    return out


def pack_rows(parts: Sequence[Tensor], places: Places) -> Tensor:
    """Return what a place sends back: for each place its tokens of every node tensor.

    Tensors of different dtypes are packed as bytes.
    """
    if len(parts) == 1 and places.in_order:
        return parts[0].reshape(-1)
    mixed = len({part.dtype for part in parts}) > 1
    pieces = [
        _bytes(part[there : there + n].reshape(-1), mixed)
        for moves in places.moves
        for part in parts
        for there, _, n in sorted(moves, key=lambda move: move[1])
    ]
    return torch.cat(pieces) if pieces else _bytes(parts[0].new_empty(0), mixed)


def _bytes(x: Tensor, mixed: bool) -> Tensor:
    return x.view(torch.uint8) if mixed else x


def unpack_rows(
    flat: Tensor,
    count: int,
    rows: Sequence[tuple[int, int, int]],
    ranges: Sequence[Sequence[Interval]],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Return a place's tensors [s, B, H, D]; heads that several places had are summed.

    Args:
        flat: place after place, of each tensor this place's tokens with that place's heads.
        count: s.
        rows: (B, H, D) of each tensor.
        ranges: for each of them the range of heads of every place.
        dtypes: of each tensor on its way; sums are in its compute dtype.
    """
    shared = [
        sum(b - a for a, b in of_part) > row[1] for of_part, row in zip(ranges, rows, strict=True)
    ]
    out = []
    for row, dtype, several in zip(rows, dtypes, shared, strict=True):
        make = flat.new_zeros if several else flat.new_empty
        out.append(make((count, *row), dtype=compute_dtype(dtype) if several else dtype))
    at = 0
    for u in range(len(ranges[0])):
        for i, (whole, dtype) in enumerate(zip(out, dtypes, strict=True)):
            into = whole[:, :, slice(*ranges[i][u])]
            size = into.numel() * (1 if flat.dtype == dtype else dtype.itemsize)
            piece = flat[at : at + size]
            if flat.dtype != dtype:
                piece = piece.clone().view(dtype)  # A copy of its own is aligned for it.
            piece = piece.view(into.shape)
            into.add_(piece) if shared[i] else into.copy_(piece)
            at += size
    return out


def widths(ranges: Sequence[Sequence[Interval]], sizes: Sequence[int]) -> list[int]:
    """Return what a token takes over all tensors at every place; `sizes` is what a head takes."""
    columns = zip(*ranges, strict=True)
    return [sum((b - a) * d for (a, b), d in zip(places, sizes, strict=True)) for places in columns]


__all__ = ["Move", "Places", "pack_heads", "pack_rows", "unpack_heads", "unpack_rows", "widths"]
