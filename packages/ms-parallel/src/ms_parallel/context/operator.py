"""The attention of one rank as an operator of torch: two custom ops with fakes and autograd.

Compiled code holds the plan and the groups by name. What backward needs is an output of the
forward op, so that selective checkpointing can keep it: a replayed forward then sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backward import backward_steps
from .collect import to_tokens
from .digest import plan_of
from .flops import state_context_flops
from .forward import Result, forward_steps
from .job import Job, make_job
from .kernels import Scoring, with_lse_gradient
from .plan import AttnPlan
from .state import needs_inputs, saved
from .topology import topology_of
from .transport import GroupTransport, Steps, Transport, run


@dataclass(frozen=True)
class Settings:
    """The options of a call, as the operators receive them after the tensors."""

    scale: float
    root: bool
    dropout_p: float
    head_start: int
    layout: str
    return_lse: bool

    def job(
        self,
        plan: AttnPlan,
        rank: int,
        q: Tensor,
        slopes: Tensor | None = None,
        rng: Tensor | None = None,
    ) -> Job:
        """Return the job of a rank for these inputs."""
        scoring = Scoring(self.scale, slopes, self.root, self.dropout_p, rng, self.head_start)
        return make_job(plan, rank, q, batch_of(q, self.layout), scoring)


def batch_of(x: Tensor, layout: str) -> int:
    """Return the rows of the batch."""
    return {"bshd": x.shape[0], "sbhd": x.shape[1], "thd": 1}[layout]


def rows_first(x: Tensor, layout: str) -> Tensor:
    """Return `x` as [s, B, H, D], contiguous."""
    if layout == "thd":
        return x.unsqueeze(1).contiguous()
    return (x.transpose(0, 1) if layout == "bshd" else x).contiguous()


def from_rows(x: Tensor, layout: str) -> Tensor:
    """Return [s, B, H, D] in a layout, contiguous."""
    if layout == "thd":
        return x.squeeze(1).contiguous()
    return (x.transpose(0, 1) if layout == "bshd" else x).contiguous()


def forward_of(
    job: Job,
    transport: Transport,
    tensors: Sequence[Tensor],
    sink: Tensor | None,
    settings: Settings,
    log: Any = None,
) -> Steps[tuple[Tensor, Tensor, list[Tensor]]]:
    """Return (out, lse, state) of a rank, in the layout of the caller; lse is empty if unwanted."""
    q, k, v = (rows_first(x, settings.layout) for x in tensors)
    result: Result = yield from forward_steps(job, transport, q, k, v, sink=sink, log=log)
    lse = result.lse.new_empty(0)
    if settings.return_lse:
        rows = result.lse
        if job.exchanged:
            parts = (rows.unsqueeze(-1),)
            rows = (yield from to_tokens(job, transport, parts, job.ranges[:1]))[0].squeeze(-1)
        thd = settings.layout == "thd"
        # The state holds the log-sum-exp too: outputs of an operator do not share memory.
        lse = (rows.squeeze(1) if thd else rows.permute(1, 2, 0)).clone(
            memory_format=torch.contiguous_format
        )
    return from_rows(result.out, settings.layout), lse, list(result.state)


def backward_of(
    job: Job,
    transport: Transport,
    dout: Tensor,
    out: Tensor | None,
    inputs: Sequence[Tensor | None],
    state: Sequence[Tensor],
    sink: Tensor | None,
    layout: str,
    log: Any = None,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Return (dq, dk, dv, dsink) of a rank, in the layout of the caller.

    Channels of dout beyond Dv are the gradient of the log-sum-exp (`with_lse_gradient`).
    """
    more = dout.shape[-1] - job.plan.head_dims[1]
    job = replace(job, shapes=replace(job.shapes, more=more)) if more else job
    given = [None if x is None else rows_first(x, layout) for x in (dout, out, *inputs)]
    assert given[0] is not None
    q, k, v = given[2:]
    grads = yield from backward_steps(
        job, transport, given[0], given[1], (q, k, v), state, sink=sink, log=log
    )
    dq, dk, dv = (from_rows(g, layout) for g in (grads.q, grads.k, grads.v))
    return dq, dk, dv, grads.sink


def kept(job: Job, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return q, k, v and out of a process, None in place of those that backward does not need."""
    needed = (*needs_inputs(job), not job.exchanged)
    return [t if wanted else None for t, wanted in zip(tensors, needed, strict=True)]


@torch.library.custom_op(
    "ms_parallel::context_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? slopes, Tensor? rng, Tensor? sink, str plan,"
    " str topology, float scale, bool root, float dropout_p, int head_start, str layout,"
    " bool return_lse) -> (Tensor, Tensor, Tensor[])",
)
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    rng: Tensor | None,
    sink: Tensor | None,
    plan: str,
    topology: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run forward over the groups; return out, the log-sum-exp if asked for, and the state."""
    settings, groups = Settings(*rest), topology_of(topology)
    job = settings.job(plan_of(plan), groups.rank, q, slopes, rng)
    steps = forward_of(job, GroupTransport(groups), (q, k, v), sink, settings, groups.log)
    # The caller has cast the inputs; partial results stay as wide as they are.
    with torch.autocast(q.device.type, enabled=False):
        return run(steps)


@forward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    rng: Tensor | None,
    sink: Tensor | None,
    plan: str,
    topology: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    settings = Settings(*rest)
    batch = batch_of(q, settings.layout)
    job = make_job(plan_of(plan), topology_of(topology).rank, q, batch)
    tokens, heads = job.plan.layout.length(job.rank), job.plan.heads.q_heads
    shape: tuple[int, ...] = (0,)
    if settings.return_lse:
        shape = (tokens, heads) if settings.layout == "thd" else (batch, heads, tokens)
    lse = q.new_empty(shape, dtype=job.shapes.sums)
    state = [q.new_empty(item.shape, dtype=item.dtype) for item in saved(job)]
    return q.new_empty([*q.shape[:-1], v.shape[-1]]), lse, state


@torch.library.custom_op(
    "ms_parallel::context_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? q, Tensor? k, Tensor? v, Tensor? out, Tensor[] state,"
    " Tensor? slopes, Tensor? rng, Tensor? sink, str plan, str topology, float scale, bool root,"
    " float dropout_p, int head_start, str layout, bool return_lse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    state: Sequence[Tensor],
    slopes: Tensor | None,
    rng: Tensor | None,
    sink: Tensor | None,
    plan: str,
    topology: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings, groups = Settings(*rest), topology_of(topology)
    job = settings.job(plan_of(plan), groups.rank, dout, slopes, rng)
    steps = backward_of(
        job, GroupTransport(groups), dout, out, (q, k, v), state, sink, settings.layout, groups.log
    )
    with torch.autocast(dout.device.type, enabled=False):
        dq, dk, dv, dsink = run(steps)
    return dq, dk, dv, dout.new_empty(0) if dsink is None else dsink


@backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    state: Sequence[Tensor],
    slopes: Tensor | None,
    rng: Tensor | None,
    sink: Tensor | None,
    plan: str,
    topology: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = plan_of(plan)
    before = list(dout.shape[:-2])
    heads, (d, dv) = found.heads, found.head_dims
    shapes = ((heads.q_heads, d), (heads.kv_heads, d), (heads.kv_heads, dv))
    dq, dk, dw = (dout.new_empty([*before, *shape]) for shape in shapes)
    dsink = dout.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return dq, dk, dw, dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, slopes, rng, sink, plan, topology, *rest = inputs
    out, _, state = output
    ctx.set_materialize_grads(False)
    ctx.plan = plan_of(plan)  # Alive as long as backward may need it.
    ctx.names, ctx.rest = (plan, topology), rest
    ctx.like = {"size": out.shape, "dtype": out.dtype, "device": out.device}
    job = make_job(ctx.plan, topology_of(topology).rank, q, batch_of(q, Settings(*rest).layout))
    ctx.save_for_backward(*kept(job, (q, k, v, out)), slopes, rng, sink, *state)


def _grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q, k, v, out, slopes, rng, sink, *state = ctx.saved_tensors
    dout = torch.zeros(**ctx.like) if dout is None else dout
    settings = Settings(*ctx.rest)
    if settings.return_lse:
        dout = with_lse_gradient(dout, dlse, settings.layout)
    dq, dk, dv, dsink = backward_op(
        dout, q, k, v, out, state, slopes, rng, sink, *ctx.names, *ctx.rest
    )
    needed = (dq, dk, dv, None, None, dsink if sink is not None else None)
    return (*needed, *(None for _ in range(2 + len(ctx.rest))))


forward_op.register_autograd(_grad, setup_context=_save)
state_context_flops()

__all__ = ["Settings", "backward_of", "forward_of", "forward_op", "kept"]
