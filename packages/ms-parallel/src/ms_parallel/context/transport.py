"""How the executor reaches other ranks: messages between two, collectives of a node or a ring.

Everything starts at once and is awaited later, through a `Handle`. The same executor runs on
`GroupTransport` (torch.distributed) and on the transport of `simulate`, which holds all ranks in
one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from .topology import CPTopology
from .trace import Ledger

Result = TypeVar("Result")
# torch 2.13 has other names for them.
all_gather_flat: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Which ranks take part in a collective: the places of a node, or the same place of all nodes.
Over = Literal["places", "nodes"]
# A rank's part of a computation: it yields what it has to wait for.
Steps = Generator["Handle", None, Result]


class Handle(Protocol):
    """Something under way."""

    def wait(self) -> Any:
        """Return when it is done (on an accelerator: order it before what follows)."""


@dataclass(frozen=True)
class Message:
    """A transfer as one of its ends sees it.

    Attributes:
        index: number of the transfer in the plan.
        peer: rank at the other end, counted in the group of the plan.
        tensor: flat, contiguous: what is sent, or where it arrives.
        sends: whether this rank is the sender.
        lane: messages of one lane start and end together; lanes do not wait for each other.
    """

    index: int
    peer: int
    tensor: Tensor
    sends: bool
    lane: str


class Transport(Protocol):
    """What the executor needs of the other ranks."""

    @property
    def ledger(self) -> Ledger:
        """What was sent."""

    def post(self, messages: Sequence[Message]) -> dict[int, Handle]:
        """Start messages; return a handle a transfer."""

    def all_to_all(
        self, over: Over, out: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Handle:
        """Exchange pieces of a flat tensor between the places of a node, or between nodes."""

    def all_gather(self, out: Tensor, flat: Tensor) -> Handle:
        """Gather equal flat tensors of the nodes, in their order."""

    def reduce_scatter(self, out: Tensor, flat: Tensor) -> Handle:
        """Sum flat tensors over the nodes and return a part to each, in their order."""


def in_order(messages: Sequence[Message]) -> list[Message]:
    """Return messages in the order in which both ends of every pair start them."""
    return sorted(messages, key=lambda m: (m.lane, m.index))


def run(steps: Steps[Result]) -> Result:
    """Run a rank's steps to the end, waiting where they ask for it."""
    try:
        while True:
            next(steps).wait()
    except StopIteration as stop:
        found: Result = stop.value
        return found


@dataclass
class _Joined:
    """Several works that are awaited together."""

    works: list[Any]

    def wait(self) -> None:
        """Wait for all, once."""
        while self.works:
            self.works.pop().wait()


@dataclass
class GroupTransport:
    """Messages and collectives of a process group, counted.

    Attributes:
        topology: the groups, and the count.
    """

    topology: CPTopology

    @property
    def ledger(self) -> Ledger:
        """What was sent through the groups."""
        return self.topology.ledger

    def post(self, messages: Sequence[Message]) -> dict[int, Handle]:
        """Start messages lane by lane, those of a lane and a group together."""
        for message in messages:
            if message.sends:
                self.ledger.bytes += message.tensor.nbytes
                self.ledger.messages += 1
        handles: dict[int, Handle] = {}
        for _, lane in itertools.groupby(in_order(messages), key=lambda m: m.lane):
            by_group: tuple[list[Message], list[Message]] = ([], [])
            for message in lane:
                by_group[self._group(message)].append(message)
            for group, batch in zip(self.topology.pair_groups, by_group, strict=True):
                handles |= self._start(batch, group) if batch else {}
        return handles

    def _group(self, message: Message) -> int:
        """Return which group a message takes: with two of them, that of its sender's parity."""
        if self.topology.p2p == "batched":
            return 0
        node = self.topology.node
        return (node if message.sends else self.topology.node_of(message.peer)) % 2

    def _start(self, batch: Sequence[Message], group: Any) -> dict[int, Handle]:
        operations = [
            dist.P2POp(
                dist.isend if message.sends else dist.irecv,
                message.tensor,
                self.topology.global_rank(message.peer),
                group,
            )
            for message in batch
        ]
        works = dist.batch_isend_irecv(operations)
        if len(works) == len(batch):
            return {m.index: _Joined([w]) for m, w in zip(batch, works, strict=True)}
        joined = _Joined(works)
        return {m.index: joined for m in batch}

    def all_to_all(
        self, over: Over, out: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Handle:
        """Exchange pieces between the places of the node, or between nodes."""
        at, group = self.topology.place, self.topology.head_group
        if over == "nodes":
            at, group = self.topology.node, self.topology.ring_group
        self._collective(flat.nbytes - sent[at] * flat.element_size())
        work = dist.all_to_all_single(
            out, flat, list(received), list(sent), group=group, async_op=True
        )
        return _Joined([work])

    def all_gather(self, out: Tensor, flat: Tensor) -> Handle:
        """Gather over the nodes."""
        self._collective((self.topology.ring - 1) * flat.nbytes)
        group = self.topology.ring_group
        return _Joined([all_gather_flat(out, flat, group=group, async_op=True)])

    def reduce_scatter(self, out: Tensor, flat: Tensor) -> Handle:
        """Sum and scatter over the nodes."""
        self._collective((self.topology.ring - 1) * out.nbytes)
        group = self.topology.ring_group
        return _Joined([reduce_scatter_flat(out, flat, group=group, async_op=True)])

    def _collective(self, sent: int) -> None:
        self.ledger.bytes += sent
        self.ledger.collectives += 1
