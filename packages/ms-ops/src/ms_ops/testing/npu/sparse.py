"""Sparse modes of torch_npu's fused attention: which keys a query may attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .require import need

OP = "npu_fusion_attention mask"
COMPRESSED = 2048


class Sparse(NamedTuple):
    """The mask arguments of a call."""

    mode: int
    mask: Tensor | None
    pre: int
    next: int
    prefix: Sequence[int] | None


def allowed(
    sparse: Sparse, q: Tensor, k: Tensor, sequence: int, sequences: int, packed: bool
) -> Tensor | None:
    """Return bool that broadcasts to [B, N, Sq, Sk] of one problem; None for everything."""
    if sparse.mask is None:
        # The kernel computes densely then, whatever the mode says: no caller can want that.
        need(OP, sparse.mode == 0, "a mask with a mode other than 0")
        return None
    need(OP, sparse.mask.dtype in (torch.bool, torch.uint8), "bool or uint8")
    need(OP, sparse.mode in (range(9) if packed else range(7)), "modes 7 and 8 only for packs")
    if sparse.mode in (0, 1):
        return _full(sparse, q, k)
    rows, keys = q.shape[2], k.shape[2]
    d = torch.arange(keys) - torch.arange(rows).unsqueeze(1)
    right_down = d - (keys - rows)
    if sparse.mode in (5, 6):
        return _prefix(sparse, q, right_down, sequence, packed)
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    need(OP, torch.equal(sparse.mask.bool(), triangle), "the compressed triangle, 1 above")
    band = (right_down >= -sparse.pre) & (right_down <= sparse.next)
    if sparse.mode == 4:
        need(OP, not band.numel() or bool(band.any()), "a band that meets the scores")
        return band
    if sparse.mode == 7:
        return band if sequence == sequences - 1 else right_down <= 0
    if sparse.mode == 8:
        return band if sequence == 0 else d <= 0
    return (d if sparse.mode == 2 else right_down) <= 0


def _full(sparse: Sparse, q: Tensor, k: Tensor) -> Tensor:
    assert sparse.mask is not None
    (b, n, rows), keys = q.shape[:3], k.shape[2]
    shapes = ((b, n, rows, keys), (b, 1, rows, keys), (1, 1, rows, keys), (rows, keys))
    need(OP, tuple(sparse.mask.shape) in shapes, "BNSS, B1SS, 11SS or SS")
    if sparse.mode == 0:
        need(OP, (sparse.pre, sparse.next) == (2147483647,) * 2, "no bounds beside a full mask")
    return ~sparse.mask.bool()


def _prefix(sparse: Sparse, q: Tensor, right_down: Tensor, sequence: int, packed: bool) -> Tensor:
    assert sparse.mask is not None
    need(OP, sparse.mode == 6, "the compressed prefix mode")
    rows, keys = right_down.shape
    below = torch.zeros(COMPRESSED // 2, COMPRESSED, dtype=torch.bool)
    below[:, COMPRESSED // 2 :] = True
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    fits = torch.equal(sparse.mask.bool(), torch.cat((triangle, below)))
    need(OP, fits, "the compressed prefix mask of 3072 rows")
    numbers = list(sparse.prefix or [])
    need(OP, packed or len(numbers) == q.shape[0] <= 32, "one prefix for each of at most 32")
    own = numbers[sequence : sequence + 1] if packed else numbers
    need(OP, all(max(0, keys - rows) <= p <= keys for p in own), "prefixes from Sk - Sq to Sk")
    first = torch.tensor(own).view(-1, 1, 1, 1)
    return (right_down <= 0) | (torch.arange(keys) < first)
