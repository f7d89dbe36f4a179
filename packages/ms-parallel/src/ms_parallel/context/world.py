"""The links between ranks that all live in one process.

A message is delivered as late as can be, when one of its ends waits for it, and until then its
receive buffer holds NaN: whoever touches a buffer too early computes nonsense.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .plan import AttnPlan
from .trace import Ledger
from .transport import Handle, Message, Over, Steps, in_order

Result = TypeVar("Result")


class SimulationError(AssertionError):
    """Ranks wait for one another for ever, or name their messages differently."""


@dataclass
class _Flight:
    """One message, as far as its ends have started it."""

    index: int
    pair: tuple[int, int]
    source: Tensor | None = None
    target: Tensor | None = None
    landed: bool = False

    def ready(self) -> bool:
        return self.source is not None and self.target is not None

    def wait(self) -> None:
        if not self.landed:
            assert self.target is not None
            assert self.source is not None
            self.target.copy_(self.source)
            self.landed = True

    def __str__(self) -> str:
        return f"transfer {self.index} of ranks {self.pair[0]} -> {self.pair[1]}"


@dataclass
class _Meeting:
    """One collective, as far as its ranks have come to it."""

    ranks: Sequence[int]
    kind: str
    finish: Callable[[dict[int, Any]], None]
    arrived: dict[int, Any] = field(default_factory=dict)
    done: bool = False

    def ready(self) -> bool:
        return len(self.arrived) == len(self.ranks)

    def wait(self) -> None:
        if not self.done:
            self.finish(self.arrived)
            self.done = True

    def __str__(self) -> str:
        return f"{self.kind} of ranks {list(self.ranks)}"


@dataclass
class World:
    """The links between the ranks of a plan."""

    plan: AttnPlan
    _sent: dict[tuple[int, int], list[_Flight]] = field(default_factory=lambda: defaultdict(list))
    _received: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    _started: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    _meetings: dict[tuple[Any, ...], list[_Meeting]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def transports(self) -> list[SimTransport]:
        """Return one transport a rank."""
        return [SimTransport(self, rank) for rank in range(self.plan.layout.size)]

    def flight(self, rank: int, message: Message) -> _Flight:
        """Return the message at this place of the pair's order, and join it."""
        pair = (rank, message.peer) if message.sends else (message.peer, rank)
        counts = self._started if message.sends else self._received
        at = counts[pair]
        counts[pair] += 1
        flights = self._sent[pair]
        if at == len(flights):
            flights.append(_Flight(message.index, pair))
        flight = flights[at]
        if flight.index != message.index:
            raise SimulationError(
                f"rank {rank} has transfer {message.index} where its peer {message.peer} has"
                f" transfer {flight.index}"
            )
        if message.sends:
            flight.source = message.tensor
        else:
            flight.target = message.tensor
            message.tensor.fill_(math.nan)
        return flight

    def meet(
        self, rank: int, ranks: Sequence[int], kind: str, given: Any, finish: Callable[..., None]
    ) -> Handle:
        """Return this rank's next collective with these ranks, and join it."""
        key = (kind, *ranks)
        meetings = self._meetings[key]
        meeting = next((m for m in meetings if rank not in m.arrived), None)
        if meeting is None:
            meeting = _Meeting(ranks, kind, finish)
            meetings.append(meeting)
        meeting.arrived[rank] = given
        return meeting


@dataclass
class SimTransport:
    """One rank's way to the others."""

    world: World
    rank: int
    ledger: Ledger = field(default_factory=Ledger)

    def post(self, messages: Sequence[Message]) -> dict[int, Handle]:
        """Start messages."""
        for message in messages:
            if message.sends:
                self.ledger.bytes += message.tensor.nbytes
                self.ledger.messages += 1
        return {m.index: self.world.flight(self.rank, m) for m in in_order(messages)}

    def _ranks(self, over: Over) -> tuple[range, int]:
        """Return the ranks of a collective, and which of them this is."""
        size, u = self.world.plan.layout.size, self.world.plan.ulysses
        node, place = divmod(self.rank, u)
        if over == "places":
            return range(node * u, (node + 1) * u), place
        return range(place, size, u), node

    def all_to_all(
        self, over: Over, out: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Handle:
        """Exchange pieces."""
        ranks, at = self._ranks(over)
        self._count(flat.nbytes - sent[at] * flat.element_size())
        given = (out, list(received), flat.split(list(sent)))
        return self.world.meet(self.rank, ranks, f"all_to_all/{over}", given, _exchange)

    def all_gather(self, out: Tensor, flat: Tensor) -> Handle:
        """Gather over the nodes."""
        ranks, _ = self._ranks("nodes")
        self._count((len(ranks) - 1) * flat.nbytes)
        return self.world.meet(self.rank, ranks, "all_gather", (out, flat), _gather)

    def reduce_scatter(self, out: Tensor, flat: Tensor) -> Handle:
        """Sum and scatter over the nodes."""
        ranks, _ = self._ranks("nodes")
        self._count((len(ranks) - 1) * out.nbytes)
        return self.world.meet(self.rank, ranks, "reduce_scatter", (out, flat), _reduce)

    def _count(self, sent: int) -> None:
        self.ledger.bytes += sent
        self.ledger.collectives += 1


def _exchange(arrived: dict[int, Any]) -> None:
    ranks = sorted(arrived)
    for at, rank in enumerate(ranks):
        out, received, _ = arrived[rank]
        pieces = [arrived[other][2][at] for other in ranks]
        sizes = [piece.numel() for piece in pieces]
        if sizes != received:
            raise SimulationError(f"rank {rank} expects {received} elements, and gets {sizes}")
        out.copy_(torch.cat(pieces))


def _gather(arrived: dict[int, Any]) -> None:
    whole = torch.cat([arrived[rank][1] for rank in sorted(arrived)])
    for out, _ in arrived.values():
        out.copy_(whole)


def _reduce(arrived: dict[int, Any]) -> None:
    ranks = sorted(arrived)
    total = torch.stack([arrived[rank][1] for rank in ranks]).sum(0)
    for rank, part in zip(ranks, total.chunk(len(ranks)), strict=True):
        arrived[rank][0].copy_(part)


def drive(runs: Sequence[Steps[Result]]) -> list[Result]:
    """Run the steps of all ranks to the end.

    Raises:
        SimulationError: none can go on; the message says what each waits for.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while waiting:
        moved = False
        for rank in list(waiting):
            handle = waiting[rank]
            if handle is not None and not handle.ready():
                continue
            moved = True
            if handle is not None:
                handle.wait()
            try:
                waiting[rank] = next(runs[rank])
            except StopIteration as stop:
                results[rank] = stop.value
                del waiting[rank]
        if not moved:
            stuck = ", ".join(
                f"rank {r} waits for {h}" for r, h in itertools.islice(waiting.items(), 4)
            )
            raise SimulationError(f"deadlock: {stuck}")
    return [results[rank] for rank in range(len(runs))]


__all__ = ["SimTransport", "SimulationError", "World", "drive"]
