"""Which keys a query of a whole sequence may attend to, and how a rectangle of it looks."""

from __future__ import annotations

import ctypes
import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ms_ops.checks import check_tensor, fail

from .layout import check_boundaries

Kind = Literal["full", "causal", "band", "dense"]
# (q0, q1, k0, k1, kind, cells): positions in the sequence.
Rectangle = tuple[int, int, int, int, Kind, int]


@dataclass(frozen=True)
class DenseMask:
    """A mask as a matrix, compared and hashed by its content.

    Attributes:
        matrix: bool [S, S], True where a query (row) may attend to a key (column), on the CPU.
        digest: of the content.
    """

    matrix: Tensor = field(compare=False, repr=False)
    digest: str = ""

    def __post_init__(self) -> None:
        """Check the matrix and take its digest."""
        check_tensor("DenseMask", "matrix", self.matrix)
        shape = tuple(self.matrix.shape)
        if self.matrix.dtype != torch.bool or len(shape) != 2 or shape[0] != shape[1]:
            got = f"{self.matrix.dtype} {list(shape)}"
            fail(ValueError, "DenseMask", "matrix", got, "bool [S, S], True = attend")
        if self.matrix.device.type != "cpu":
            need = "a mask on the CPU: plans are made there"
            fail(ValueError, "DenseMask", "matrix", self.matrix.device, need)
        matrix = self.matrix.contiguous()
        content = ctypes.string_at(matrix.data_ptr(), matrix.numel()) if matrix.numel() else b""
        digest = hashlib.sha256(repr(shape).encode() + content).hexdigest()
        object.__setattr__(self, "digest", digest)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.matrix.shape[0]


@dataclass(frozen=True)
class AttnMask:
    """A band of the score matrix inside every document, or any matrix.

    Query i sees key j of the same document where -left <= j - i <= right, positions in the
    sequence. Hashable, so that plans can be kept by it.

    Attributes:
        left: how many keys before its own a query sees; None for all.
        right: how many after its own; None for all, 0 for causal.
        documents: boundaries of documents that do not see one another, from 0 to the number of
            tokens; () for one document.
        dense: a matrix instead of all this.

    Raises:
        ValueError: negative bounds, boundaries out of order, or a matrix together with the rest.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[int, ...] = ()
    dense: DenseMask | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a length."""
        for name, bound in (("left", self.left), ("right", self.right)):
            if bound is not None and bound < 0:
                fail(ValueError, "AttnMask", name, bound, "0 or more keys, or None for all")
        if self.documents:
            check_boundaries("AttnMask", "documents", self.documents)
        if self.dense is not None and (self.left, self.right, self.documents) != (None, None, ()):
            need = "a matrix alone: fold bounds and documents into it (`AttnMask.matrix`)"
            fail(ValueError, "AttnMask", "dense", "dense with left, right or documents", need)

    @classmethod
    def full(cls, documents: tuple[int, ...] = ()) -> AttnMask:
        """Return the mask under which every query sees its whole document."""
        return cls(documents=tuple(documents))

    @classmethod
    def causal(cls, documents: tuple[int, ...] = ()) -> AttnMask:
        """Return the mask under which no query sees a key after it."""
        return cls(right=0, documents=tuple(documents))

    @classmethod
    def window(
        cls, left: int | None, right: int | None = 0, documents: tuple[int, ...] = ()
    ) -> AttnMask:
        """Return a sliding window: `left` keys before a query and `right` after, and its own."""
        return cls(left, right, tuple(documents))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> AttnMask:
        """Return the mask that a bool [S, S] tensor says, True = attend."""
        return cls(dense=DenseMask(matrix))

    def check(self, total: int) -> None:
        """Raise ValueError unless the mask fits a sequence of `total` tokens."""
        if self.documents and self.documents[-1] != total:
            need = f"boundaries that end at {total}, the tokens of the layout"
            fail(ValueError, "AttnMask", "documents", self.documents[-1], need)
        if self.dense is not None and self.dense.size != total:
            got = [self.dense.size] * 2
            fail(ValueError, "AttnMask", "dense", got, f"[{total}, {total}], as the layout has")

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the document of position `start`, cut to what its queries before `stop` see.

        Args:
            start: first query, inside a document.
            stop: the query after the last, not beyond that document.

        Returns:
            The interval of keys outside of which these queries see nothing; its upper end is
            `2**62` where nothing but the sequence ends it.
        """
        low, high = 0, 2**62
        if self.documents:
            at = bisect_right(self.documents, start)
            low, high = self.documents[at - 1], self.documents[at]
        if self.left is not None:
            low = max(low, start - self.left)
        if self.right is not None:
            high = min(high, stop + self.right)
        return low, high

    def rectangle(self, q0: int, q1: int, k0: int, k1: int) -> Rectangle | None:
        """Say what queries [q0, q1) see of keys [k0, k1), or None: nothing.

        Rows and columns that see nothing at the edges of a band are cut off.

        Args:
            q0: first query; with documents, all queries and keys are of one document.
            q1: the query after the last.
            k0: first key.
            k1: the key after the last.
        """
        if self.dense is not None:
            return _dense_rectangle(self.dense.matrix, q0, q1, k0, k1)
        if self.left is not None:
            q1, k0 = min(q1, k1 + self.left), max(k0, q0 - self.left)
        if self.right is not None:
            q0, k1 = max(q0, k0 - self.right), min(k1, q1 + self.right)
        if q0 >= q1 or k0 >= k1:
            return None
        cells = band_cells(q0, q1, k0, k1, self.left, self.right)
        if cells == (q1 - q0) * (k1 - k0):
            return q0, q1, k0, k1, "full", cells
        n = q1 - q0
        if self.right == 0 and (q0, q1) == (k0, k1) and cells == n * (n + 1) // 2:
            return q0, q1, k0, k1, "causal", cells
        return q0, q1, k0, k1, "band", cells

    def cells(self, total: int) -> int:
        """Number of pairs that are attended to."""
        if self.dense is not None:
            return int(self.dense.matrix.sum())
        ends = self.documents or (0, total)
        return sum(band_cells(a, b, a, b, self.left, self.right) for a, b in pairwise(ends))

    def matrix(self, total: int) -> Tensor:
        """Return bool [total, total], True = attend: for small sequences and as an oracle."""
        self.check(total)
        return self.tile(torch.arange(total), torch.arange(total))

    def tile(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return bool [n, m], True = attend, of any tokens.

        Args:
            queries: int64 [n], positions in the sequence.
            keys: int64 [m].
        """
        rows = queries.unsqueeze(1)
        if self.dense is not None:
            return self.dense.matrix.to(queries.device)[rows, keys]
        d = keys - rows
        seen = torch.ones_like(d, dtype=torch.bool)
        if self.left is not None:
            seen &= d >= -self.left
        if self.right is not None:
            seen &= d <= self.right
        if self.documents:
            ends = torch.tensor(self.documents, device=queries.device)
            row_doc, key_doc = (torch.searchsorted(ends, p, right=True) for p in (rows, keys))
            seen &= row_doc == key_doc
        return seen


def band_cells(q0: int, q1: int, k0: int, k1: int, left: int | None, right: int | None) -> int:
    """Number of pairs of the rectangle with -left <= j - i <= right, None for no bound."""
    below = 0 if left is None else _pairs_under(q0, q1, k0, k1, -left)
    upto = (q1 - q0) * (k1 - k0) if right is None else _pairs_under(q0, q1, k0, k1, right + 1)
    return max(0, upto - below)


def _pairs_under(q0: int, q1: int, k0: int, k1: int, bound: int) -> int:
    """Number of pairs with j - i < bound: row i counts keys k0 .. min(k1, i + bound)."""
    keys = k1 - k0
    # Rows from `first` see one key or more, rows from `all_` see all.
    first, all_ = max(q0, k0 - bound + 1), max(q0, k1 - bound)
    first, all_ = min(first, q1), min(all_, q1)
    rows = all_ - first
    partial = rows * (first + bound - k0) + rows * (rows - 1) // 2
    return partial + (q1 - all_) * keys


def _dense_rectangle(matrix: Tensor, q0: int, q1: int, k0: int, k1: int) -> Rectangle | None:
    tile = matrix[q0:q1, k0:k1]
    cells = int(tile.sum())
    if not cells:
        return None
    if cells < tile.numel():
        rows, keys = (torch.nonzero(tile.any(dim)).flatten() for dim in (1, 0))
        q0, q1 = q0 + int(rows[0]), q0 + int(rows[-1]) + 1
        k0, k1 = k0 + int(keys[0]), k0 + int(keys[-1]) + 1
        tile = matrix[q0:q1, k0:k1]
    if cells == tile.numel():
        return q0, q1, k0, k1, "full", cells
    n = q1 - q0
    square = (q0, q1) == (k0, k1) and cells == n * (n + 1) // 2
    if square and bool(tile.tril().sum() == cells):
        return q0, q1, k0, k1, "causal", cells
    return q0, q1, k0, k1, "dense", cells
