"""Groups of a small world for the operators that communicate, and what each rank checks there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ms_ops.testing.cases.comm import OPERATORS
from ms_ops.testing.comm import CommSample, CommTest

SIZES = {1: ((1, 1),), 2: ((2, 1), (1, 2)), 4: ((2, 2),)}


class World:
    """The groups of this rank, made once: all ranks, and the two of each grid of `SIZES`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.grids = {sizes: _grid(rank, size, sizes[0]) for sizes in SIZES[size]}

    def calls(self, dtype: torch.dtype) -> Iterator[tuple]:
        """Yield (test, sample, groups, sizes) for every operator and grid."""
        for test in OPERATORS.values():
            for sizes, groups in self.of(test):
                for sample in test.samples(sizes, dtype, "cpu"):
                    yield test, sample, groups, sizes

    def of(self, test: CommTest) -> list[tuple]:
        """Return the (sizes, groups) that an operator runs on here."""
        if len(test.groups) == 1:
            return [((self.size, 1), (dist.group.WORLD,))]
        return list(self.grids.items())

    def find(self, op: str, name: str, dtype: torch.dtype) -> tuple:
        """Return (test, sample, groups, sizes) of one sample, on the last grid."""
        test = OPERATORS[op]
        sizes, groups = self.of(test)[-1]
        found: CommSample = next(s for s in test.samples(sizes, dtype, "cpu") if s.name == name)
        return test, found, groups, sizes


def _grid(rank: int, size: int, inner: int) -> tuple:
    """Return this rank's group of consecutive ranks and the one across."""
    mine = []
    rows = [list(range(i, i + inner)) for i in range(0, size, inner)]
    columns = [list(range(i, size, inner)) for i in range(inner)]
    for parts in (rows, columns):
        for ranks in parts:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine.append(group)
    return tuple(mine)
