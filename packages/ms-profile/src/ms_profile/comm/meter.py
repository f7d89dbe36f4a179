"""Bytes, number and order of all communication that one rank issues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch._ops import OpOverload

from ms_profile import tap
from ms_profile.comm.calls import communicates, phase, transfers

__all__ = ["Call", "CommMeter"]


@dataclass(frozen=True)
class Call:
    """One collective or point-to-point operation as this rank issued it.

    Attributes:
        index: Its place in the order of the calls.
        op: all_reduce, all_gather, reduce_scatter, broadcast, reduce, gather, scatter, all_to_all,
            send, recv or barrier.
        group: Description of the group, or its name where it has none.
        ranks: Global ranks of the group.
        bytes: Size of the full buffer: what an all-gather returns, a reduce-scatter takes, the
            tensor of the others; of an all-to-all this rank's whole input.
        wire_bytes: What this rank sends to others.
        to: The same by global rank of the receiver, nothing for those that get nothing.
        dtype: Name of the element type.
        phase: backward and recompute are inside an autograd pass; forward and other outside of
            one, with gradients on and off. So what a training loop issues between the passes
            (gradient reduction, pipeline messages) is forward.
        module: Path of the module that the call belongs to, empty if none's.
    """

    index: int
    op: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    wire_bytes: int
    to: Mapping[int, int]
    dtype: str
    phase: tap.Phase
    module: str


class CommMeter(tap.Meter):
    """Records every communication that is issued inside the context.

        with CommMeter() as meter:
            train_step()
        meter.total(group="TENSOR_MODEL_PARALLEL_GROUP", phase="forward")

    Counted when it is issued, whoever issues it and whatever backend carries it out: the operators
    of `torch.distributed`, functional, coalesced and of DTensor. Entering again starts anew.

    Raises:
        LookupError: at an operator that takes a process group and that no reader is known for.
    """

    watches_modules: ClassVar[bool] = True

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def opened(self) -> None:
        """Forgets the calls of an earlier use."""
        self._calls = []

    def before(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Records the transfers of an operator."""
        if not communicates(func):
            return
        for group, transfer in transfers(func, args, kwargs):
            to = {group.ranks[peer]: count for peer, count in transfer.sent.items() if count}
            call = Call(
                index=len(self._calls),
                op=transfer.op,
                group=group.name,
                ranks=group.ranks,
                bytes=transfer.bytes,
                wire_bytes=sum(to.values()),
                to=to,
                dtype=transfer.dtype,
                phase=phase(),
                module=tap.module(),
            )
            self._calls.append(call)

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls in the order of their issue."""
        return tuple(self._calls)

    def total(
        self,
        *,
        op: str | None = None,
        group: str | None = None,
        phase: tap.Phase | None = None,
        of: Literal["wire_bytes", "bytes", "calls"] = "wire_bytes",
    ) -> int:
        """Sum over the calls that agree with all that is given.

        Args:
            op: Name of the operation.
            group: Name of the group.
            phase: forward, backward, recompute or other.
            of: What is summed: bytes sent to others, sizes of buffers, or the number of calls.
        """
        wanted: dict[str, str | None] = {"op": op, "group": group, "phase": phase}
        return sum(
            1 if of == "calls" else getattr(call, of)
            for call in self._calls
            if all(value in (None, getattr(call, name)) for name, value in wanted.items())
        )

    def table(self) -> list[dict[str, Any]]:
        """Calls, bytes and wire bytes per group, operation and phase, in order of appearance."""
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for call in self._calls:
            key = {"group": call.group, "op": call.op, "phase": call.phase}
            row = rows.setdefault(
                (call.group, call.op, call.phase), {**key, "calls": 0, "bytes": 0, "wire_bytes": 0}
            )
            row["calls"] += 1
            row["bytes"] += call.bytes
            row["wire_bytes"] += call.wire_bytes
        return list(rows.values())

    def matrix(self) -> list[list[int]]:
        """Bytes from rank (row) to rank (column); only this rank's row is known and filled."""
        rank, size = _place()
        rows = [[0] * size for _ in range(size)]
        for call in self._calls:
            for peer, count in call.to.items():
                rows[rank][peer] += count
        return rows

    def gather(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> list[list[int]]:
        """The matrix with the rows of all ranks of `group`, by one all-gather that is not metered.

        Args:
            group: Ranks that take part, all of which call this; the world by default.
            device: Where the group's backend wants its tensors.
        """
        rows = self.matrix()
        if not dist.is_initialized():
            return rows
        with tap.unmetered():
            own = torch.tensor(rows[dist.get_rank()], dtype=torch.int64, device=device)
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            gathered = [torch.empty_like(own) for _ in ranks]
            dist.all_gather(gathered, own, group=group)
            for rank, row in zip(ranks, gathered, strict=True):
                rows[rank] = row.tolist()
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        rank, size = _place()
        calls = [asdict(call) | {"ranks": list(call.ranks)} for call in self._calls]
        return {"kind": "comm", "version": 1, "rank": rank, "world_size": size, "calls": calls}


def _place() -> tuple[int, int]:
    """Own rank and size of the world; one process without a group is a world of one."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
