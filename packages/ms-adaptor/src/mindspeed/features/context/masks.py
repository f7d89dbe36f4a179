"""From the masks of Megatron's batches to the mask of a plan."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ms_parallel.context import AttnMask, SeqLayout, documents_from_tokens


def boundaries(tokens: Tensor, end_of_document: int) -> Tensor:
    """Return where documents begin in the rows of a batch laid end to end.

    Args:
        tokens: [b, S], whole rows.
        end_of_document: the token that closes a document and belongs to it.

    Returns:
        int64 [n + 1] on the CPU, from 0 to b * S; every row begins a document.
    """
    return torch.tensor(documents_from_tokens(tokens.cpu(), end_of_document))


def is_boundaries(mask: Tensor | None) -> bool:
    """Whether what stands in for a mask says where documents begin."""
    return mask is not None and mask.dim() == 1 and mask.dtype == torch.int64


def host_integers(starts: Tensor) -> tuple[int, ...]:
    """Return a tensor's integers; those of one tensor on a device are read once."""
    if starts.device.type == "cpu":
        return tuple(starts.tolist())
    found: tuple[int, ...] | None = _STARTS.get(starts)
    if found is None:
        found = tuple(starts.tolist())
        _STARTS.put(starts, found)
    return found


def dense(
    attention_mask: Tensor, layout: SeqLayout, group: Any, batch: int, band: AttnMask | None
) -> tuple[AttnMask, int]:
    """Return the mask of a plan that a mask of Megatron's means.

    Args:
        attention_mask: bool [b or 1, 1, S, S], or [.., s, S] with the rows of this rank's tokens;
            True where a query must NOT attend.
        layout: of one row of the batch.
        group: the context-parallel ranks, who hold the other rows.
        batch: rows of the batch.
        band: what a query sees beside that, None for all.

    Returns:
        The mask, and how many rows of the batch it spans: 1 where all have the same.

    Raises:
        ValueError: another shape.
    """
    known = _DENSE.get(attention_mask)
    if known is None:
        known = _dense(attention_mask, layout, group, batch, band)
        _DENSE.put(attention_mask, known)
    return known  # type: ignore[no-any-return]


def _dense(
    attention_mask: Tensor, layout: SeqLayout, group: Any, batch: int, band: AttnMask | None
) -> tuple[AttnMask, int]:
    total, own = layout.total, layout.length(dist.get_rank(group))
    shape = tuple(attention_mask.shape)
    good = len(shape) == 4 and shape[0] in (1, batch) and shape[1] == 1
    if not good or shape[2] not in (own, total) or shape[3] != total:
        raise ValueError(
            f"MegatronCPAttention: attention_mask: got {shape}, need ({batch} or 1, 1,"
            f" {total}, {total}), or the {own} rows of this rank's tokens"
        )
    seen = ~attention_mask[:, 0]
    if shape[2] != total:
        seen = _gathered(seen, layout, group)
    seen = seen.cpu()
    if band is not None:
        seen = seen & band.matrix(total)
    if bool((seen == seen[:1]).all()):
        return AttnMask.from_matrix(seen[0]), 1
    return AttnMask.from_matrix(torch.block_diag(*seen)), batch


def _gathered(rows: Tensor, layout: SeqLayout, group: Any) -> Tensor:
    """Return all rows of a mask of which every rank holds those of its tokens."""
    mine = rows.to(torch.uint8).contiguous()
    parts = [mine.new_empty(mine.shape[0], length, mine.shape[2]) for length in layout.lengths]
    dist.all_gather(parts, mine, group=group)
    whole: Tensor = layout.unshard(parts, 1).bool()
    return whole


class _Recent:
    """What was found for the tensors that were asked about last; holds no tensor alive."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: list[tuple[weakref.ref[Tensor], int, Any]] = []

    def get(self, tensor: Tensor) -> Any:
        for held, version, value in self._entries:
            if held() is tensor and version == tensor._version:
                return value
        return None

    def put(self, tensor: Tensor, value: Any) -> None:
        entry = (weakref.ref(tensor), tensor._version, value)
        self._entries = [entry, *(e for e in self._entries if e[0]() is not None)][: self._size]


_STARTS, _DENSE = _Recent(), _Recent()
