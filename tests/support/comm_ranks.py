"""Groups of a small world for the operators that communicate, and what each rank checks there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ms_ops.fused_comm import npu
from ms_ops.testing.cases.comm import OPERATORS
from ms_ops.testing.comm import CommSample, CommTest, forward_and_backward
from ms_ops.testing.npu.comm import named_groups
from support.fake import fake_world

SIZES = {1: ((1, 1),), 2: ((2, 1), (1, 2)), 4: ((2, 2),)}
# Not every operator has an NPU kernel of its own.
ON_NPU = [
    "matmul_all_reduce",
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "all_gather_matmul_reduce_scatter",
    "matmul_all_reduce_add_rms_norm",
    "matmul_all_reduce_add_rms_norm_",
    "grouped_matmul_all_reduce",
]


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

    def all_groups(self) -> list:
        """Return every group of this rank."""
        return [dist.group.WORLD, *(group for grid in self.grids.values() for group in grid)]

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


class Named:
    """A group whose HCCL backend counts how often it is asked for its name."""

    def __init__(self) -> None:
        self.asked = 0

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        assert device.type == "meta"  # stands for the tensors' device
        return SimpleNamespace(get_hccl_comm_name=self.name)

    def name(self, rank: int) -> str:
        self.asked += 1
        return f"hccl of global rank {rank}"


def run_on_emulation() -> None:
    """Run all lines of the NPU backend, on groups that move nothing: the values mean nothing."""
    with fake_world(4, rank=3):
        world = World(3, 4)
        group = Named()
        names = [npu.hccl_name(group, torch.device("meta")) for _ in range(2)]
        assert (names, group.asked) == (["hccl of global rank 3"] * 2, 1)
        three = dist.new_group([1, 2, 3])
        with named_groups(*world.all_groups()):
            for test, sample, groups, _ in world.calls(torch.bfloat16):
                if test.name in ON_NPU:
                    forward_and_backward(test, sample.ranks[3], sample.options, groups)
        facts = npu.Facts("npu", torch.bfloat16, (("reduce_size", three.size()),))
        assert "not [3]" in npu.BACKEND.kernels["matmul_all_reduce"].supports(facts)
        facts = npu.Facts("npu", torch.bfloat16, (("reduce_size", 1),))
        assert "one rank" in npu.BACKEND.kernels["matmul_all_reduce"].supports(facts)
