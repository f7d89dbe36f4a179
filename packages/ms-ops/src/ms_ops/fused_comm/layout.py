"""The order of rows between experts' batches and the blocks that collectives move.

Blocks are [tp, ep, own experts, rows, columns], flattened to rows of [tp * E, rows, columns]: rank
j of ep and rank i of tp are blocks of the first two axes, so that one copy serves both collectives.
"""

from __future__ import annotations

from torch import Tensor


def gathered_rows(blocks: Tensor, by_rows: bool, ep_size: int, tp_size: int) -> Tensor:
    """Return [own experts, ep * C, H] from [tp * ep * own experts, C or C / tp, H / tp or H].

    Args:
        blocks: stacked over tp, each as it came from the exchange over ep.
        by_rows: whether tp splits the rows, which then lie in the order (ep, tp, row); else it
            splits the columns.
        ep_size: ranks of ep.
        tp_size: ranks of tp.
    """
    rows, columns = blocks.shape[1:]
    experts = blocks.shape[0] // (ep_size * tp_size)
    parts = blocks.view(tp_size, ep_size, experts, rows, columns)
    if by_rows:
        return parts.permute(2, 1, 0, 3, 4).reshape(experts, ep_size * tp_size * rows, columns)
    return parts.permute(2, 1, 3, 0, 4).reshape(experts, ep_size * rows, tp_size * columns)


def scattered_rows(z: Tensor, by_rows: bool, ep_size: int, tp_size: int) -> Tensor:
    """Return the inverse of `gathered_rows`."""
    experts, rows, columns = z.shape
    rows = rows // ep_size
    if by_rows:
        parts = z.view(experts, ep_size, tp_size, rows // tp_size, columns).permute(2, 1, 0, 3, 4)
    else:
        parts = z.view(experts, ep_size, rows, tp_size, columns // tp_size).permute(3, 1, 0, 2, 4)
    return parts.reshape(tp_size * ep_size * experts, *parts.shape[3:])
