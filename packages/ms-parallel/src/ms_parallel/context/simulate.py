"""All ranks of a plan in one process, without process groups: for tests, and to look inside.

The ranks' steps run in turn over the links of `world`. Events and counts of what was sent can be
recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import check_inputs
from .operator import Settings, backward_of, forward_of, kept
from .plan import AttnPlan
from .trace import Ledger, Log
from .world import World, drive


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
        outs = [out for out, _, _ in results]
        ctx.kept = [
            kept(job, [t.detach() for t in own])
            for job, *own in zip(jobs, q, k, v, outs, strict=True)
        ]
        ctx.states = [state for _, _, state in results]
        return tuple(outs)

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


__all__ = ["Simulation", "simulate_attention"]
