"""Boundaries of packed documents from a batch, and the batch cut as a layout says.

For the data loader: what it returns are plain integers and tensors on the host, so that no later
step has to read device memory for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ms_ops.checks import fail

from .layout import SeqLayout


def documents_from_tokens(tokens: Tensor, eod: int) -> tuple[int, ...]:
    """Return the boundaries of documents that end with an end-of-document token each.

    Args:
        tokens: [s] or [b, s] of integers; rows are laid end to end, and end a document.
        eod: the token that ends a document, and belongs to it.

    Returns:
        From 0 to the number of all tokens, ascending: no document is empty. What `AttnMask` and
        `SeqLayout.zigzag_docs` take.
    """
    length = _rows("documents_from_tokens", "tokens", tokens)
    ends = (tokens.reshape(-1) == eod).nonzero().flatten() + 1
    return _boundaries(ends.tolist(), tokens.numel(), length)


def documents_from_positions(positions: Tensor) -> tuple[int, ...]:
    """Return the boundaries of documents in each of which positions start from 0.

    Args:
        positions: [s] or [b, s] of integers, as `documents_from_tokens` takes tokens.
    """
    length = _rows("documents_from_positions", "positions", positions)
    starts = (positions.reshape(-1) == 0).nonzero().flatten()
    return _boundaries(starts.tolist(), positions.numel(), length)


def shard_batch(
    batch: Mapping[str, Tensor | None],
    layout: SeqLayout,
    rank: int,
    dim: int = 1,
    whole: Sequence[str] = ("attention_mask",),
) -> dict[str, Tensor | None]:
    """Return the part of a batch that a rank holds.

    Args:
        batch: tensors by name, with the whole sequence along `dim`; None stays None.
        layout: which rank holds which tokens.
        rank: whose part.
        dim: the dimension of the tokens.
        whole: names that are not cut: every rank gets all of them.

    Raises:
        ValueError: a tensor has another number of tokens than the layout.
    """
    return {
        name: value if value is None or name in whole else layout.shard(value, rank, dim)
        for name, value in batch.items()
    }


def _rows(op: str, argument: str, tensor: Tensor) -> int:
    if tensor.ndim not in (1, 2) or tensor.is_floating_point():
        got = f"{tensor.dtype} {list(tensor.shape)}"
        fail(ValueError, op, argument, got, "integers [s] or [b, s]")
    return tensor.shape[-1]


def _boundaries(ends: Sequence[int], total: int, length: int) -> tuple[int, ...]:
    rows = range(length, total, length) if length else ()
    return tuple(sorted({0, *ends, *rows, total})) if total else (0, 0)
