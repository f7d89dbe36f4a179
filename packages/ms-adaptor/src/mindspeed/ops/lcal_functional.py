"""`coc_ops`: products that overlap with communication, with results written into given tensors."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from ms_ops import comm
from ms_ops.checks import fail

from .process_groups import Group, resolved

OP = "coc_ops"


@dataclass(frozen=True)
class TP2DConfig:
    """How a group's ranks form a grid.

    Attributes:
        ag_dim: ranks over which rows are gathered.
        rs_dim: ranks over which sums are scattered.
        inner_dim_is_ag: whether consecutive ranks gather; else they scatter.
    """

    ag_dim: int
    rs_dim: int
    inner_dim_is_ag: bool


class CoCOperations:
    """The products over one group: the one given to `use`, else Megatron's tensor-parallel group.

    The second factor is [k, n]; where only [n, k] fits it is taken as transposed. A square one is
    always [k, n]: `ms_ops.comm` has a flag for the other. `bias` is [n] or [1, n], added once,
    after the sum. The result is written into `output` and returned.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._grids: WeakKeyDictionary[
            dist.ProcessGroup, dict[TP2DConfig, tuple[dist.ProcessGroup, dist.ProcessGroup]]
        ] = WeakKeyDictionary()

    def use(self, group: Group | None) -> None:
        """Run over this group (or the one of this name) from now on; None: Megatron's."""
        self._group = None if group is None else resolved(OP, "group", group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The group in use."""
        if self._group is not None:
            return self._group
        from megatron.core import parallel_state

        found: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return found

    def matmul_all_reduce(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Write the sum over the ranks of input1 input2, and bias, into output [m, n]."""
        y = comm.matmul_all_reduce(
            input1, input2, self.group, bias=_flat(bias), transpose_b=_turned(input1, input2)
        )
        return _written(output, y, "output")

    def all_gather_matmul(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Write the product of all ranks' rows and input2, and bias, into output [m, n]."""
        y = comm.all_gather_matmul(
            input1, input2, self.group, bias=_flat(bias), transpose_b=_turned(input1, input2)
        )
        return _written(output, y, "output")

    def all_gather_matmul_v2(
        self,
        input1: Tensor,
        input2: Tensor,
        output: Tensor,
        comm_output: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Do the same, and write the gathered rows into comm_output [m, k]."""
        y, gathered = comm.all_gather_matmul(
            input1,
            input2,
            self.group,
            bias=_flat(bias),
            transpose_b=_turned(input1, input2),
            return_gathered=True,
        )
        rows = _written(comm_output, gathered, "comm_output")
        return _written(output, y, "output"), rows

    def matmul_reduce_scatter(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Write the own rows of the sum over the ranks, and bias, into output [m / ranks, n]."""
        y = comm.matmul_reduce_scatter(
            input1, input2, self.group, bias=_flat(bias), transpose_b=_turned(input1, input2)
        )
        return _written(output, y, "output")

    def pure_matmul(
        self, input1: Tensor, input2: Tensor, output: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Write input1 input2, and bias, into output [m, n]; nothing is sent."""
        y = input1 @ (input2.t() if _turned(input1, input2) else input2)
        row = _flat(bias)
        y = y if row is None else (y + row).to(y.dtype)
        return _written(output, y, "output")

    def all_gather_matmul_reduce_scatter(
        self,
        input1: Tensor,
        input2: Tensor,
        output: Tensor,
        tp2d_config: TP2DConfig,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Gather rows over one dimension of the grid, multiply, sum and scatter over the other.

        The first call of a grid makes its groups: all ranks of the group must be there.
        """
        gather, scatter = self._grid(tp2d_config)
        y = comm.all_gather_matmul_reduce_scatter(
            input1,
            input2,
            gather,
            scatter,
            bias=_flat(bias),
            transpose_b=_turned(input1, input2),
        )
        return _written(output, y, "output")

    def _grid(self, config: TP2DConfig) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        group = self.group
        ranks = dist.get_process_group_ranks(group)
        sizes = (config.ag_dim, config.rs_dim)
        if sizes[0] * sizes[1] != len(ranks) or min(sizes) < 1:
            got = f"a grid of {sizes[0]} times {sizes[1]}"
            fail(ValueError, OP, "tp2d_config", got, f"one of the group's {len(ranks)} ranks")
        known = self._grids.setdefault(group, {})
        if config not in known:
            inner = sizes[0] if config.inner_dim_is_ag else sizes[1]
            row, column = divmod(group.rank(), inner)
            near = _new_group(ranks[row * inner :][:inner])
            across = _new_group(ranks[column::inner])
            known[config] = (near, across) if config.inner_dim_is_ag else (across, near)
        return known[config]


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group


def _turned(input1: Tensor, input2: Tensor) -> bool:
    return input1.shape[-1] != input2.shape[0] and input1.shape[-1] == input2.shape[-1]


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape(-1)


def _written(output: Tensor, y: Tensor, name: str) -> Tensor:
    if output.shape != y.shape:
        fail(ValueError, OP, name, tuple(output.shape), f"{tuple(y.shape)}")
    if output.dtype != y.dtype:
        fail(TypeError, OP, name, output.dtype, f"{y.dtype}, the dtype of input1")
    return output.copy_(y)


coc_ops = CoCOperations()

__all__ = ["CoCOperations", "TP2DConfig", "coc_ops"]
