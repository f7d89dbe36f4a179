"""Which process holds which tokens of a sequence: intervals of integers, no tensors, no groups."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ms_ops.checks import fail

Interval = tuple[int, int]


@dataclass(frozen=True)
class SeqLayout:
    """A sequence of `total` tokens, every token at exactly one of the processes.

    Attributes:
        total: number of tokens.
        shards: for every process its tokens, as intervals [start, stop) of the sequence in the
            order in which the process holds them. () for a process without tokens.

    Raises:
        ValueError: the shards are not a partition of the tokens.
    """

    total: int
    shards: tuple[tuple[Interval, ...], ...]

    def __post_init__(self) -> None:
        """Check that the shards are a partition."""
        at = 0
        for start, stop in sorted(part for shard in self.shards for part in shard):
            if start != at or stop <= start:
                need = f"every token of [0, {self.total}) once, in intervals that are not empty"
                fail(ValueError, "SeqLayout", "shards", f"[{start}, {stop}) after {at}", need)
            at = stop
        if at != self.total or not self.shards:
            got = f"{at} tokens at {len(self.shards)} processes"
            fail(ValueError, "SeqLayout", "shards", got, f"{self.total} tokens at 1 or more")

    @classmethod
    def contiguous(cls, total: int, size: int) -> SeqLayout:
        """Return rank after rank in the order of the sequence; lengths differ by at most one."""
        cuts = _cuts("SeqLayout.contiguous", total, size, size)
        return cls(total, tuple(_joined([part]) for part in cuts))

    @classmethod
    def zigzag(cls, total: int, size: int) -> SeqLayout:
        """Return chunks c and 2P - 1 - c of 2P at rank c, which balances a causal mask.

        Chunks differ by at most one token, and so do ranks. For lengths that are a multiple of 2P
        it is the split of Megatron and Transformer Engine.
        """
        cuts = _cuts("SeqLayout.zigzag", total, size, 2 * size)
        return cls(total, tuple(_joined([cuts[r], cuts[-1 - r]]) for r in range(size)))

    @classmethod
    def zigzag_docs(cls, cu_seqlens: Sequence[int], size: int) -> SeqLayout:
        """Return every document split in zigzag by itself.

        What is left of a document after 2P equal chunks is dealt out rank after rank, and the next
        document goes on dealing where the last one ended: ranks differ by at most one token,
        whatever the documents. Documents may be shorter than P.

        Args:
            cu_seqlens: boundaries of the documents, from 0 to the number of tokens.
            size: number of ranks, P.
        """
        check_boundaries("SeqLayout.zigzag_docs", "cu_seqlens", cu_seqlens)
        _cuts("SeqLayout.zigzag_docs", cu_seqlens[-1], size, size)
        shards: list[list[Interval]] = [[] for _ in range(size)]
        turn = 0
        for start, stop in pairwise(cu_seqlens):
            base, rest = divmod(stop - start, 2 * size)
            extra = [(rest + size - 1 - (r - turn) % size) // size for r in range(size)]
            front = [base + (e > 0) for e in extra]
            back = [base + (e > 1) for e in extra]
            ends = list(accumulate(front + back[::-1], initial=start))
            for r in range(size):
                shards[r] += [(ends[r], ends[r + 1]), (ends[-2 - r], ends[-1 - r])]
            turn = (turn + rest) % size
        return cls(cu_seqlens[-1], tuple(_joined(shard) for shard in shards))

    @classmethod
    def from_segments(cls, segments: Iterable[Iterable[Interval]]) -> SeqLayout:
        """Return the layout with these intervals at each rank, in this order."""
        shards = tuple(_joined([(a, b) for a, b in shard]) for shard in segments)
        return cls(sum(b - a for shard in shards for a, b in shard), shards)

    def rows(self, batch: int) -> SeqLayout:
        """Return the layout of `batch` rows laid end to end, each split like this one.

        A rank holds its part of row 0, then of row 1, ...: its tensor [batch, s] flattened.
        """
        shards = tuple(
            _joined([(a + i * self.total, b + i * self.total) for i in range(batch) for a, b in s])
            for s in self.shards
        )
        return SeqLayout(self.total * batch, shards)

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.shards)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each process."""
        return tuple(sum(b - a for a, b in shard) for shard in self.shards)

    def length(self, rank: int) -> int:
        """Number of tokens of a process."""
        return sum(b - a for a, b in self.shards[rank])

    def segments(self, rank: int) -> tuple[tuple[int, int, int], ...]:
        """Return (row, start, stop) of each interval: where it begins locally, and the tokens."""
        rows = accumulate((b - a for a, b in self.shards[rank]), initial=0)
        return tuple((row, a, b) for row, (a, b) in zip(rows, self.shards[rank], strict=False))

    def grouped(self, places: int) -> SeqLayout:
        """Return the layout of nodes of `places` consecutive ranks, each in order of the sequence.

        Raises:
            ValueError: the number of ranks is no multiple of `places`.
        """
        if places < 1 or self.size % places:
            fail(ValueError, "SeqLayout.grouped", "places", places, f"a divisor of {self.size}")
        groups = (self.shards[r : r + places] for r in range(0, self.size, places))
        nodes = (_joined(sorted(part for shard in group for part in shard)) for group in groups)
        return SeqLayout(self.total, tuple(nodes))

    def subdivided(self, places: int) -> SeqLayout:
        """Return the layout in which each process is a node of `places` ranks: undoes `grouped`.

        The tokens of a process, in its order, are cut in `places` parts that differ by at most
        one token.
        """
        shards = []
        for rank in range(self.size):
            parts = _cuts("SeqLayout.subdivided", self.length(rank), places, places)
            for a, b in parts:
                inside = ((s + max(a - r, 0), min(e, s + b - r)) for r, s, e in self.segments(rank))
                shards.append(_joined(list(inside)))
        return SeqLayout(self.total, tuple(shards))

    def local_index(self, rank: int) -> Tensor:
        """Return int64 [length(rank)]: the tokens of a rank in its order."""
        return _arange(self.shards[rank])

    def position_ids(self, rank: int, documents: Sequence[int] = ()) -> Tensor:
        """Return int64 [length(rank)]: the position of each local token, for rotary embeddings.

        Args:
            rank: whose tokens.
            documents: boundaries of documents; positions then start from 0 in each of them.
        """
        index = self.local_index(rank)
        if not documents:
            return index
        self._check_documents("position_ids", documents)
        starts = torch.tensor(documents, dtype=torch.int64)
        return index - starts[torch.searchsorted(starts, index, right=True) - 1]

    def cu_seqlens(self, rank: int, documents: Sequence[int]) -> tuple[int, ...]:
        """Return the boundaries of the documents in what a rank holds: as many as `documents`.

        A document of which the rank holds nothing has length 0.

        Raises:
            ValueError: the rank does not hold its tokens in the order of the documents.
        """
        self._check_documents("cu_seqlens", documents)
        held = [0] * (len(documents) - 1)
        last = 0
        for _, start, stop in self.segments(rank):
            while start < stop:
                doc = bisect_right(documents, start) - 1
                if doc < last:
                    need = "intervals in the order of the documents"
                    fail(ValueError, "SeqLayout.cu_seqlens", "rank", f"{rank}, out of order", need)
                end = min(stop, documents[doc + 1])
                held[doc] += end - start
                start, last = end, doc
        return tuple(accumulate(held, initial=0))

    def _check_documents(self, name: str, documents: Sequence[int]) -> None:
        check_boundaries(f"SeqLayout.{name}", "documents", documents)
        if documents[-1] != self.total:
            need = f"boundaries that end at {self.total}, the tokens of the layout"
            fail(ValueError, f"SeqLayout.{name}", "documents", documents[-1], need)

    def shard(self, tensor: Tensor, rank: int, dim: int = 0) -> Tensor:
        """Return the part of a whole tensor that a rank holds.

        A view where the rank holds one interval, else a copy. Differentiable.

        Args:
            tensor: the whole sequence along `dim`.
            rank: whose part.
            dim: the dimension of the tokens.

        Raises:
            ValueError: the tensor has another number of tokens.
        """
        if tensor.shape[dim] != self.total:
            got = f"{tensor.shape[dim]} along dimension {dim}"
            fail(ValueError, "SeqLayout.shard", "tensor", got, f"{self.total} tokens")
        parts = [tensor.narrow(dim, a, b - a) for a, b in self.shards[rank]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)

    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return the whole tensor from the parts of all ranks. Differentiable.

        Args:
            parts: one tensor a rank, in the order of the ranks.
            dim: the dimension of the tokens.

        Raises:
            ValueError: another number of parts, or of tokens in one of them.
        """
        got = tuple(part.shape[dim] for part in parts)
        if got != self.lengths:
            fail(ValueError, "SeqLayout.unshard", "parts", got, f"tokens a rank {self.lengths}")
        pieces = [
            (a, part.narrow(dim, row, b - a))
            for rank, part in enumerate(parts)
            for row, a, b in self.segments(rank)
        ]
        if not pieces:
            return parts[0].clone()
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda p: p[0])], dim)


def check_boundaries(op: str, argument: str, boundaries: Sequence[int]) -> None:
    """Raise ValueError unless `boundaries` runs from 0 upwards (empty documents are allowed)."""
    ordered = all(a <= b for a, b in pairwise(boundaries))
    if len(boundaries) < 2 or boundaries[0] != 0 or not ordered:
        need = "boundaries of documents that start at 0 and do not fall"
        fail(ValueError, op, argument, tuple(boundaries[:8]), need)


def _cuts(op: str, total: int, size: int, parts: int) -> list[Interval]:
    if size < 1:
        fail(ValueError, op, "size", size, "1 or more ranks")
    if total < 0:
        fail(ValueError, op, "total", total, "0 or more tokens")
    base, rest = divmod(total, parts)
    ends = list(accumulate((base + (i < rest) for i in range(parts)), initial=0))
    return list(pairwise(ends))


def _joined(parts: Sequence[Interval]) -> tuple[Interval, ...]:
    """Drop empty intervals and join those that continue one another."""
    out: list[Interval] = []
    for start, stop in parts:
        if stop <= start:
            continue
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def _arange(parts: Sequence[Interval]) -> Tensor:
    runs = [torch.arange(a, b) for a, b in parts]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)
