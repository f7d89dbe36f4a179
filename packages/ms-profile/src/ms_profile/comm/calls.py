"""Finds the communication in what torch dispatches: which group, which transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload

from ms_profile import modules, tap
from ms_profile.comm.transfers import READERS, Transfer

__all__ = ["Group", "communicates", "phase", "transfers"]

_resolve: Callable[[str], dist.ProcessGroup] = torch._C._distributed_c10d._resolve_process_group  # type: ignore[assignment]

# Names under which operators take a group by its name; those of torch_npu's fused products too.
_GROUP_NAMES = frozenset({"group_name", "hcom", "group_ep", "group_tp"})


@dataclass(frozen=True)
class Group:
    """A process group as this rank knows it.

    Attributes:
        name: Its description, or the name that torch gave it where it has none.
        ranks: Global ranks in the group's order.
        rank: This process's rank within the group.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int


@cache
def _group_argument(func: OpOverload) -> str | None:
    """Name of the argument that carries the group; None: the operator takes no group."""
    for argument in func._schema.arguments:
        if argument.name in _GROUP_NAMES or str(argument.type).endswith(".ProcessGroup"):
            return str(argument.name)
    return None


@cache
def _argument_names(func: OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


def phase() -> tap.Phase:
    """The phase of a communication that is being dispatched, while modules are watched.

    An autograd function's backward often applies the function itself for the way back, which looks
    like a forward that is run again; but a recomputation runs the forward of modules.
    """
    phase = tap.phase()
    again = phase == "recompute" and not torch.is_grad_enabled()
    return "backward" if again and modules.is_running() is False else phase


def communicates(func: OpOverload) -> bool:
    """Whether an operator takes a process group."""
    return _group_argument(func) is not None


def transfers(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Group, Transfer]]:
    """What an operator that `communicates` moves.

    Raises:
        LookupError: the operator has no reader, or its group is not one of this process's.
    """
    reader = READERS.get(func._schema.name)
    if reader is None:
        raise LookupError(
            f"{func._schema.name} takes a process group, but what it sends is not known: "
            "teach it with ms_profile.comm.register"
        )
    named = dict(zip(_argument_names(func), args, strict=False)) | dict(kwargs)
    group = _group(named[_group_argument(func) or ""])
    for transfer in reader(named, group.rank, len(group.ranks)):
        yield group, transfer


def _group(carried: Any) -> Group:
    """The group behind an operator's argument: an object, boxed or not, or a name."""
    if isinstance(carried, torch.ScriptObject):
        carried = dist.ProcessGroup.unbox(carried)
    elif isinstance(carried, str):
        carried = _resolve(carried)
    try:
        ranks = dist.get_process_group_ranks(carried)
    except KeyError:
        raise LookupError(
            f"group {carried.group_name!r} was not made by torch.distributed in this process"
        ) from None
    description = carried.group_desc
    named = description and description != "undefined"
    return Group(description if named else carried.group_name, tuple(ranks), carried.rank())
