"""How long a plan takes on a machine of given rates: a simulation of its programs.

A model, to compare plans with one another before anything runs. What is simulated: every node
computes one step after the other; a step starts when what it waits for is there; its messages
start then, and go at the rate of their link, one after the other on each way out of and into a
rank; collectives of the head exchange and of a gather overlap with nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ms_ops.checks import fail

from .cost import exchange_bytes, gather_bytes, transfer_bytes
from .plan import AttnPlan, Program, Step


@dataclass(frozen=True)
class Link:
    """A way between two ranks.

    Attributes:
        bytes_per_s: what one rank sends through it in a second, and at the same time receives.
        latency_s: from the start of a message to its first byte, in seconds.
    """

    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Rates of the ranks that a plan runs on, as achieved, not as printed on the box.

    Attributes:
        flops_per_s: floating-point operations of attention in a second, of one rank.
        fast: link between ranks of one domain (a host, say).
        slow: link between domains.
        domain: how many consecutive ranks form a domain; 0 for all, `slow` is then not used.
        block_s: seconds to start the kernels of one block.
    """

    flops_per_s: float
    fast: Link
    slow: Link | None = None
    domain: int = 0
    block_s: float = 0.0

    def __post_init__(self) -> None:
        """Check that the rates are rates."""
        links = [self.fast, *([self.slow] if self.slow else [])]
        if self.flops_per_s <= 0 or any(link.bytes_per_s <= 0 for link in links):
            fail(ValueError, "Machine", "flops_per_s, bytes_per_s", self, "rates above 0")
        if self.domain and self.slow is None:
            fail(ValueError, "Machine", "slow", None, "a link between domains, or domain 0")

    def link(self, src: int, dst: int) -> Link:
        """Return the link between two ranks."""
        if not self.domain or self.slow is None or src // self.domain == dst // self.domain:
            return self.fast
        return self.slow


@dataclass(frozen=True)
class Estimate:
    """Seconds of one attention, of the slowest rank.

    Attributes:
        forward_s: forward, collectives included.
        backward_s: backward likewise.
        compute_s: of both, the compute of the rank that has most.
        collective_s: of both, collectives.
    """

    forward_s: float
    backward_s: float
    compute_s: float
    collective_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s

    @property
    def exposed_s(self) -> float:
        """What is not compute: messages that nothing hides, and collectives."""
        return self.total_s - self.compute_s


def estimate(plan: AttnPlan, machine: Machine, element_bytes: int = 2, batch: int = 1) -> Estimate:
    """Return the time that a plan takes.

    Args:
        plan: the plan.
        machine: rates of the ranks.
        element_bytes: bytes per element of queries, keys and values.
        batch: rows of the batch.
    """
    d, dv = plan.head_dims
    place = max(range(plan.ulysses), key=lambda u: _heads(plan, u))
    rate = 2 * batch * _heads(plan, place)[0] / machine.flops_per_s
    run = _Run(plan, machine, place, element_bytes, batch)
    forward, forward_compute = run.program(plan.forward, rate * (d + dv))
    backward, backward_compute = run.program(plan.backward, rate * (3 * d + 2 * dv))
    collectives = [_exchange_s(plan, machine, element_bytes, batch, way) for way in (0, 1)]
    return Estimate(
        forward + collectives[0],
        backward + collectives[1],
        forward_compute + backward_compute,
        sum(collectives),
    )


def _heads(plan: AttnPlan, place: int) -> tuple[int, int]:
    (a, b), (c, d) = plan.heads.q[place], plan.heads.kv[place]
    return b - a, d - c


class _Run:
    """The ranks at one place of their nodes: no other place's messages cross theirs."""

    def __init__(
        self, plan: AttnPlan, machine: Machine, place: int, element_bytes: int, batch: int
    ) -> None:
        self.plan, self.machine, self.place = plan, machine, place
        self.element_bytes, self.batch = element_bytes, batch

    def program(self, program: Program, cell_s: float) -> tuple[float, float]:
        """Return the end of the last node, and the longest compute of a node."""
        nodes = len(program.steps)
        ready, busy = [0.0] * nodes, [0.0] * nodes
        arrival: dict[int, float] = {}
        # When a way out of or into a node, by link, is free again.
        way: dict[tuple[str, int, Link], float] = defaultdict(float)
        for t in range(len(program.steps[0])):
            now = [steps[t] for steps in program.steps]
            for n, step in enumerate(now):
                ready[n] = max([ready[n], *(arrival[i] for i in step.wait)])
            posted = {i: n for n, step in enumerate(now) for i in step.post}
            self._send(program, sorted(posted), ready, arrival, way)
            for n, step in enumerate(now):
                work = self._compute(step, cell_s)
                busy[n] += work
                ready[n] = max([ready[n] + work, *(arrival[i] for i in step.wait_after)])
        return max(ready), max(busy)

    def _compute(self, step: Step, cell_s: float) -> float:
        cells = sum(block.cells for block in step.blocks)
        return cells * cell_s + len(step.blocks) * self.machine.block_s

    def _send(
        self,
        program: Program,
        indexes: list[int],
        ready: list[float],
        arrival: dict[int, float],
        way: dict[tuple[str, int, Link], float],
    ) -> None:
        """Let the messages of a step go, those first that both ends are ready for first."""
        begin = {
            i: max(ready[program.transfers[i].src], ready[program.transfers[i].dst])
            for i in indexes
        }
        for i in sorted(indexes, key=lambda i: (begin[i], i)):
            transfer = program.transfers[i]
            u, places = self.place, self.plan.ulysses
            link = self.machine.link(transfer.src * places + u, transfer.dst * places + u)
            out, into = ("out", transfer.src, link), ("in", transfer.dst, link)
            sent = transfer_bytes(self.plan, transfer, u, self.element_bytes, self.batch)
            start = max(begin[i], way[out], way[into])
            way[out] = way[into] = start + sent / link.bytes_per_s
            arrival[i] = way[out] + link.latency_s


def _exchange_s(
    plan: AttnPlan, machine: Machine, element_bytes: int, batch: int, direction: int
) -> float:
    """Return the seconds of the collectives of forward (0) or backward (1)."""
    seconds = 0.0
    ranks = range(plan.layout.size)
    if plan.ulysses > 1:
        link = machine.link(0, plan.ulysses - 1)
        sent = max(exchange_bytes(plan, r, element_bytes, batch)[direction] for r in ranks)
        seconds += 2 * link.latency_s + sent / link.bytes_per_s
    if plan.forward.gather:
        link = machine.link(0, plan.layout.size - 1)
        sent = max(gather_bytes(plan, r, element_bytes, batch)[direction] for r in ranks)
        seconds += (plan.nodes.size - 1) * link.latency_s + sent / link.bytes_per_s
    return seconds
