"""Process groups as the operators of MindSpeed are given them: by a communicator's name."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ms_ops import comm
from ms_ops.checks import fail

Group = dist.ProcessGroup | str


def resolved(op: str, argument: str, group: Group) -> dist.ProcessGroup:
    """Return the group of a name, or the group that was given.

    Args:
        op: the operator, for messages.
        argument: the argument's name, for messages.
        group: a process group, torch's name of one of this rank's, or its HCCL communicator's.

    Raises:
        ValueError: no group of this rank has that name.
    """
    if not isinstance(group, str):
        return group  # the operator itself checks what it is
    names = dist.distributed_c10d._world.pg_names.items()
    found = [each for each, name in names if group in (name, communicator(each))]
    if not found:
        need = "the name of one of this rank's groups, or a group"
        fail(ValueError, op, argument, repr(group), need)
    return found[0]


def communicator(group: Any, device: torch.device | None = None) -> str | None:
    """Return the name of a group's HCCL communicator, None where it has none (yet)."""
    if device is None:
        if "torch_npu" not in sys.modules:
            return None
        device = torch.device("npu")
    backend = group._get_backend(device)
    # One that was not made has no name that anybody can have passed.
    name: str = backend.get_hccl_comm_name(dist.get_rank(), init_comm=False)
    return name or None


def check_size(op: str, argument: str, group: dist.ProcessGroup, size: int) -> None:
    """Raise ValueError unless a group has the number of ranks that was said."""
    if group.size() != size:
        fail(ValueError, op, argument, size, f"{group.size()}, the ranks of the group")


def check_reduction(op: str, reduce_op: str, comm_turn: int) -> None:
    """Raise ValueError for what the kernels refuse."""
    if reduce_op != "sum":
        fail(ValueError, op, "reduce_op", repr(reduce_op), "'sum'")
    if comm_turn != 0:
        fail(ValueError, op, "comm_turn", comm_turn, "0")


def summed(bias: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    """Return the sum of all ranks' biases, which the old operators add inside of their sum."""
    if bias is None:
        return None
    row = bias.reshape(1, -1)
    return comm.matmul_all_reduce(row.new_ones(1, 1), row, group).view(-1)
