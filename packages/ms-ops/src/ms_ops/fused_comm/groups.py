"""Process groups as custom ops take them: a name and a size, which a tracer keeps as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checks import fail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def named(op: str, argument: str, group: ProcessGroup) -> tuple[str, int]:
    """Return a group's name and size; the name of a group of one is "": nothing is sent there.

    Raises:
        TypeError: not a process group that this rank is a member of.
    """
    if not isinstance(group, torch.distributed.ProcessGroup):
        got = type(group).__name__
        fail(TypeError, op, argument, got, "a torch.distributed.ProcessGroup with this rank in it")
    size = group.size()
    return (group.group_name if size > 1 else ""), size


def check_different(op: str, first: str, one: str, second: str, other: str) -> None:
    """Raise ValueError where two arguments name one group."""
    if one and one == other:
        fail(ValueError, op, second, f"the group of {first}", "another group")


def group_of(name: str) -> ProcessGroup:
    """Return the group of a name that `named` gave."""
    group: ProcessGroup = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group
