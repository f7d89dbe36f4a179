"""Forward of one rank: exchange heads, walk through the steps, merge, exchange back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Call, Rows
from .collect import gather_keys, to_heads, to_tokens
from .executor import Run
from .job import Job
from .kernels import attend, merge
from .plan import Transfer
from .state import Saved, saved
from .store import Entry, Piece, Slot
from .trace import Event, Log
from .transport import Steps, Transport


@dataclass(frozen=True)
class Result:
    """What forward gives.

    Attributes:
        out: [s, B, H, Dv], this process's tokens, dtype of the inputs.
        lse: [Sn, B, h], of the node's tokens and this place's heads.
        state: what backward needs beside the inputs, as `state.saved` lists it.
    """

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, ...]


@dataclass
class _Sums:
    """Output and log-sum-exp so far, of rows from `low` on of some owner's queries."""

    low: int
    count: int
    out: Tensor | None = None
    lse: Tensor | None = None


class Forward(Run):
    """The steps of forward."""

    def __init__(self, job: Job, transport: Transport, log: Log | None) -> None:
        super().__init__(job, "forward", transport, log)
        self.sums = {job.node: _Sums(0, job.rows)}

    def compute(self, call: Call) -> None:
        """Attend to some keys and merge with what is there."""
        self.note_call(call)
        q = self.take("q", call.q)
        out, lse = attend(call, self.job.scoring, q, *self.take_keys(call))
        self._merge(call.q, out, lse)

    def outgoing(self, transfer: Transfer, entries: Sequence[Entry]) -> Sequence[Tensor]:
        """Return keys, values or queries as they are, and outputs for others as they stand."""
        if transfer.buffers[0].what != "o":
            return super().outgoing(transfer, entries)
        found = []
        for entry in entries:
            sums = self._filled(entry.owner)
            whole = sums.out if entry.part == "o" else sums.lse
            assert whole is not None
            found.append(whole[entry.start - sums.low : entry.stop - sums.low])
        return found

    def sent(self, transfer: Transfer) -> Sequence[Slot]:
        """Forget outputs that are on their way to their owner."""
        for buffer in transfer.buffers:
            if buffer.what == "o":
                self.sums.pop(buffer.owner, None)
        return ()

    def arrived(self, transfer: Transfer, entries: Sequence[Entry], slot: Slot) -> None:
        """Keep keys, values and queries; merge outputs that another node computed."""
        what = transfer.buffers[0].what
        if what != "o":
            super().arrived(transfer, entries, slot)
            if what == "q":
                low = min(e.start for e in entries)
                count = max(e.stop for e in entries) - low
                self.sums[entries[0].owner] = _Sums(low, count)
            return
        self.note(Event("read", self.step, transfer.index, reads=(slot.number,)))
        for first, second in zip(entries[::2], entries[1::2], strict=True):
            out, lse = (self._piece(e, slot).rows for e in (first, second))
            rows = Rows(self.job.node, ((first.start, first.stop),))
            self._merge(rows, out.to(self.job.shapes.sums), lse)

    def _merge(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        sums = self.sums[rows.owner]
        if sums.out is None and rows.index is None and rows.count == sums.count:
            sums.out, sums.lse = out.to(self.job.shapes.sums), lse.contiguous()
            return
        sums = self._filled(rows.owner)
        assert sums.out is not None
        assert sums.lse is not None
        window = slice(rows.low - sums.low, rows.high - sums.low)
        old, old_lse = sums.out[window], sums.lse[window]
        if rows.index is None:
            new, new_lse = merge(old, old_lse, out, lse)
            old.copy_(new)
            old_lse.copy_(new_lse)
            return
        some, some_lse = (t.index_select(0, rows.index) for t in (old, old_lse))
        new, new_lse = merge(some, some_lse, out, lse)
        old.index_copy_(0, rows.index, new)
        old_lse.index_copy_(0, rows.index, new_lse)

    def _filled(self, owner: int) -> _Sums:
        """Return the sums of an owner's queries as tensors, also if they see no key."""
        sums, shapes = self.sums[owner], self.job.shapes
        if sums.out is None or sums.lse is None:
            like = self.like
            sums.out = like.new_zeros((sums.count, *shapes.row("o")), dtype=shapes.sums)
            row = shapes.row("lse")
            sums.lse = like.new_full((sums.count, *row), -torch.inf, dtype=shapes.sums)
        return sums

    def total(self) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of the node's queries."""
        sums = self._filled(self.job.node)
        assert sums.out is not None
        assert sums.lse is not None
        return sums.out, sums.lse


def forward_steps(
    job: Job,
    transport: Transport,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: Tensor | None = None,
    log: Log | None = None,
) -> Steps[Result]:
    """Attend; yields what there is to wait for.

    Args:
        job: what this rank does.
        transport: the way to the other ranks.
        q: [s, B, H, D], this process's tokens with all heads.
        k: [s, B, Hk, D].
        v: [s, B, Hk, Dv].
        sink: [H], a score without a value that every row also has.
        log: receives events.
    """
    run = Forward(job, transport, log)
    whole: tuple[Tensor, ...] = (q, k, v)
    if job.exchanged:
        whole = yield from to_heads(job, transport, (q, k, v), job.ranges)
    for part, rows in zip(("q", "k", "v"), whole, strict=True):
        run.store.put(part, job.node, Piece(0, job.rows, rows))
    gathered = None
    if run.program.program.gather:
        gathered = yield from gather_keys(run, ("k", "v"))
    yield from run.walk()
    total, lse = run.total()
    if sink is not None:
        total, lse = _with_sink(job, total, lse, sink)
    o = total.to(q.dtype)
    state = tuple(_kept(run, item, o, lse, gathered) for item in saved(job))
    out = o
    if job.exchanged:
        out = (yield from to_tokens(job, transport, (o,), job.ranges[:1]))[0]
    return Result(out, lse, state)


def _with_sink(job: Job, out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let each head's sink take its share of every row."""
    first, last = job.plan.heads.q[job.place]
    total = torch.logaddexp(lse, sink[first:last].to(lse.dtype))
    return out * torch.exp(lse - total).unsqueeze(-1), total


def _kept(run: Forward, item: Saved, o: Tensor, lse: Tensor, gathered: Tensor | None) -> Tensor:
    """Return one tensor of the state."""
    if item.kind == "o":
        return o
    if item.kind == "lse":
        return lse
    if item.kind == "gathered":
        assert gathered is not None
        if len(item.shape) == 1:
            return gathered
        owners = range(run.job.plan.nodes.size)
        return torch.cat([p.rows for o in owners for p in run.store.pieces("k", o)])
    if item.kind == "message":
        slot = next(s for s in run.store.slots() if s.transfer == item.transfer)
        return slot.memory[: item.shape[0]]
    held = run.store.pieces(item.kind, item.owner)
    return next(p.rows for p in held if (p.start, p.stop) == (item.start, item.stop))


__all__ = ["Forward", "Result", "forward_steps"]
