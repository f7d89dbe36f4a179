"""All ranks of a plan in one process, without process groups: for tests, and to look inside.

The ranks' steps run in turn. A message is delivered as late as can be, when one of its ends waits
for it, and until then its receive buffer holds NaN: whoever touches a buffer too early computes
nonsense, or is found by the events (`trace`).
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

from .attention import Settings, backward_of, check_inputs, forward_of, keeps
from .executor import Job
from .plan import AttnPlan
from .trace import Ledger, Log
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


@dataclass
class Simulation:
    """What the ranks of a simulated attention sent and did.

    Attributes:
        forward: of every rank, what it sent.
        backward: likewise.
        forward_logs: of every rank, its events.
        backward_logs: likewise.
    """

    forward: list[Ledger] = field(default_factory=list)
    backward: list[Ledger] = field(default_factory=list)
    forward_logs: list[Log] = field(default_factory=list)
    backward_logs: list[Log] = field(default_factory=list)


def simulate_attention(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    plan: AttnPlan,
    *,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    head_start: int = 0,
    sink: Tensor | None = None,
    layout: str = "bshd",
    record: Simulation | None = None,
) -> list[Tensor]:
    """Run `context_attention` of all ranks in this process; differentiable.

    Args:
        q: the queries of every rank, as it would pass them.
        k: the keys.
        v: the values.
        plan: for as many ranks.
        scale: as in `context_attention`, and so the rest.
        alibi_slopes: likewise.
        alibi_sqrt: likewise.
        dropout_p: likewise.
        dropout_rng: likewise.
        head_start: likewise.
        sink: likewise; its gradient is the sum of all ranks'.
        layout: likewise.
        record: receives what was sent and done.

    Returns:
        The output of every rank.
    """
    factor = q[0].shape[-1] ** -0.5 if scale is None else scale
    settings = Settings(factor, alibi_sqrt, dropout_p, head_start, layout, False)
    record = Simulation() if record is None else record
    for rank, shard in enumerate(zip(q, k, v, strict=True)):
        check_inputs(shard, plan, rank, layout)
    run: Any = _Simulated.apply
    return list(run(plan, settings, record, alibi_slopes, dropout_rng, sink, *q, *k, *v))


class _Simulated(torch.autograd.Function):
    """All ranks of an attention."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: AttnPlan,
        settings: Settings,
        record: Simulation,
        slopes: Tensor | None,
        rng: Tensor | None,
        sink: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        size = plan.layout.size
        q, k, v = (tensors[i * size : (i + 1) * size] for i in range(3))
        jobs = [settings.job(plan, r, q[r], slopes, rng) for r in range(size)]
        ways = World(plan).transports()
        logs: list[Log] = [[] for _ in range(size)]
        results = drive(
            [
                forward_of(jobs[r], ways[r], (q[r], k[r], v[r]), sink, settings, logs[r])
                for r in range(size)
            ]
        )
        record.forward, record.forward_logs = [way.ledger for way in ways], logs
        ctx.jobs, ctx.settings, ctx.record, ctx.sink = jobs, settings, record, sink
        ctx.kept = [_needed(jobs[r], (q[r], k[r], v[r], results[r][0])) for r in range(size)]
        ctx.states = [state for _, _, state in results]
        return tuple(out for out, _, _ in results)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        size = len(ctx.jobs)
        ways = World(ctx.jobs[0].plan).transports()
        logs: list[Log] = [[] for _ in range(size)]
        runs = []
        for r, job in enumerate(ctx.jobs):
            *inputs, out = ctx.kept[r]
            state, layout = ctx.states[r], ctx.settings.layout
            runs.append(
                backward_of(job, ways[r], douts[r], out, inputs, state, ctx.sink, layout, logs[r])
            )
        grads = drive(runs)
        ctx.record.backward, ctx.record.backward_logs = [way.ledger for way in ways], logs
        parts = [grad[3] for grad in grads if grad[3] is not None]
        dsink = torch.stack(parts).sum(0) if parts else None
        flat = [grads[r][i] for i in range(3) for r in range(size)]
        return (None, None, None, None, None, dsink, *flat)


def _needed(job: Job, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    queries, keys, output = keeps(job)
    q, k, v, out = (t.detach() for t in tensors)
    return q if queries else None, k if keys else None, v if keys else None, out if output else None


__all__ = ["Simulation", "SimulationError", "World", "drive", "simulate_attention"]
