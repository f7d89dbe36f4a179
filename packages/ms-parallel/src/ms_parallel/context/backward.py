"""Backward of one rank: the steps of the backward program, partial gradients travelling along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import Call, Rows
from .collect import gather_keys, hold_gathered, scatter_sums, to_heads, to_tokens
from .executor import Run
from .job import Job
from .kernels import attend_backward
from .plan import Transfer
from .state import saved
from .store import Entry, Piece, Slot, manifest
from .trace import Event, Log
from .transport import Steps, Transport


@dataclass(frozen=True)
class Grads:
    """Gradients of this process's inputs, in their dtype; of the sink its part, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None


class Backward(Run):
    """The steps of backward."""

    def __init__(self, job: Job, transport: Transport, log: Log | None) -> None:
        super().__init__(job, "backward", transport, log)
        self._zeros("dq", job.node, 0, job.rows)
        if self.program.program.gather:
            self.sums = self._all_sums()
        else:
            for part in ("dk", "dv"):
                self._zeros(part, job.node, 0, job.rows)

    def _zeros(self, part: str, owner: int, start: int, stop: int) -> None:
        shape = (stop - start, *self.job.shapes.row(part))
        rows = self.like.new_zeros(shape, dtype=self.job.shapes.sums)
        self.store.put(part, owner, Piece(start, stop, rows))

    def _all_sums(self) -> Tensor:
        """Return sums for the keys and values of all nodes in one flat tensor, and hold them."""
        shapes = self.job.shapes
        widths = [shapes.elements(part, "dkv") for part in ("dk", "dv")]
        total = self.job.plan.nodes.total * sum(widths)
        flat = self.like.new_zeros(total, dtype=shapes.sums)
        at = 0
        for owner, count in enumerate(self.job.plan.nodes.lengths):
            for part, width in zip(("dk", "dv"), widths, strict=True):
                rows = flat[at : at + count * width].view(count, *shapes.row(part))
                self.store.put(part, owner, Piece(0, count, rows))
                at += count * width
        return flat

    def compute(self, call: Call) -> None:
        """Add one call's gradients to the sums."""
        for rows in call.kv:
            self._make_sums(rows)
        self.note_call(call)
        dout, q, out, lse = (self.take(part, call.q) for part in ("do", "q", "o", "lse"))
        k, v = self.take_keys(call)
        dq, dk, dv = attend_backward(call, self.job.scoring, (dout, q, k, v, out), lse)
        self._add("dq", call.q, dq)
        at = 0
        for rows in call.kv:
            self._add("dk", rows, dk[at : at + rows.count])
            self._add("dv", rows, dv[at : at + rows.count])
            at += rows.count

    def _make_sums(self, rows: Rows) -> None:
        """Make the sums in which a call's gradients leave this node, where there are none yet."""
        for (owner, start, stop), transfer in self.program.sums_out.items():
            mine = owner == rows.owner and start < rows.high and rows.low < stop
            if not mine or any(p.start == start for p in self.store.pieces("dk", owner)):
                continue
            entries, size = manifest(transfer, self.job.shapes)
            slot = self.pool.acquire(size, self.job.shapes.grads)
            slot.memory.zero_()
            self.note(Event("write", self.step, writes=(slot.number,)))
            for entry in entries:
                if not any(
                    p.start == entry.start for p in self.store.pieces(entry.part, entry.owner)
                ):
                    self.store.put(entry.part, entry.owner, self._piece(entry, slot))

    def before_sending(self, transfer: Transfer) -> None:
        """Make zeros of gradients to which this node had nothing to add."""
        for buffer in transfer.buffers:
            if buffer.what == "dkv":
                self._make_sums(Rows(buffer.owner, ((buffer.start, buffer.stop),)))

    def _add(self, part: str, rows: Rows, grad: Tensor) -> None:
        whole = self.store.one(part, rows.owner, rows.low, rows.high)
        if whole is not None and rows.index is not None:
            window = whole.rows[rows.low - whole.start : rows.high - whole.start]
            window.index_add_(0, rows.index, grad.to(window.dtype))
            return
        at = 0
        for start, stop in rows.ranges:
            for piece in self.store.over(part, rows.owner, start, stop):
                low, high = max(start, piece.start), min(stop, piece.stop)
                some = grad[at + low - start : at + high - start]
                piece.rows[low - piece.start : high - piece.start] += some
            at += stop - start

    def arrived(self, transfer: Transfer, entries: Sequence[Entry], slot: Slot) -> None:
        """Keep what is computed with; add partial gradients, or go on with them."""
        if transfer.buffers[0].what not in ("dkv", "dq"):
            super().arrived(transfer, entries, slot)
            if transfer.buffers[0].what == "qo":
                for buffer in transfer.buffers:
                    self._zeros("dq", buffer.owner, buffer.start, buffer.stop)
            return
        for entry in entries:
            piece = self._piece(entry, slot)
            held = self.store.pieces(entry.part, entry.owner)
            if not any(p.start < entry.stop and entry.start < p.stop for p in held):
                self.store.put(entry.part, entry.owner, piece)
                continue
            into = self._slots((entry.part,), (Rows(entry.owner, ((entry.start, entry.stop),)),))
            event = Event("write", self.step, transfer.index, -1, (slot.number,), tuple(into))
            self.note(event)
            rows = Rows(entry.owner, ((entry.start, entry.stop),))
            self._add(entry.part, rows, piece.rows)

    def sent(self, transfer: Transfer) -> Sequence[Slot]:
        """Forget partial gradients that are on their way."""
        empty: list[Slot] = []
        for buffer in transfer.buffers:
            at = (buffer.owner, buffer.start, buffer.stop)
            if buffer.what == "dkv" and buffer.owner != self.job.node:
                empty += self.store.drop(("dk", "dv"), *at)
            if buffer.what == "dq":
                empty += self.store.drop(("dq",), *at)
        return empty

    def sums_of(self, part: str) -> Tensor:
        """Return the sum of an own gradient."""
        return self.store.over(part, self.job.node, 0, self.job.rows)[0].rows


def backward_steps(
    job: Job,
    transport: Transport,
    dout: Tensor,
    out: Tensor | None,
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    state: Sequence[Tensor],
    *,
    sink: Tensor | None = None,
    log: Log | None = None,
) -> Steps[Grads]:
    """Return the gradients; yields what there is to wait for.

    Args:
        job: what this rank does.
        transport: the way to the other ranks.
        dout: [s, B, H, Dv], gradient of this process's output.
        out: that output, where the node's is the same.
        inputs: q, k and v of this process, those of them that `state.needs_inputs` says.
        state: of forward.
        sink: as in forward.
        log: receives events.
    """
    run = Backward(job, transport, log)
    _restore(run, out, inputs, state)
    if job.exchanged:
        # Kept as they were before the exchange: keys, or keys and values.
        again = [t for t in inputs[1:] if t is not None]
        ranges = (job.ranges[0], *job.ranges[1 : 1 + len(again)])
        dout, *keys = yield from to_heads(job, transport, (dout, *again), ranges)
        for part, rows in zip(("k", "v"), keys, strict=False):
            run.store.put(part, job.node, Piece(0, job.rows, rows))
    run.store.put("do", job.node, Piece(0, job.rows, dout))
    if run.program.program.gather and job.plan.kv_keep != "kv":
        yield from gather_keys(run, ("v",) if job.plan.kv_keep == "k" else ("k", "v"))
    yield from run.walk()
    dk, dv = yield from _key_sums(run)
    return (yield from _results(run, dk, dv, sink))


def _restore(
    run: Backward,
    out: Tensor | None,
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    state: Sequence[Tensor],
) -> None:
    """Put the state where the steps find it."""
    job, store = run.job, run.store
    if not job.exchanged:
        for part, given in zip(("q", "k", "v", "o"), (*inputs, out), strict=True):
            if given is not None:
                store.put(part, job.node, Piece(0, job.rows, given))
    for item, tensor in zip(saved(job), state, strict=True):
        if item.kind == "message":
            slot = run.pool.adopt(tensor)
            for entry in item.entries:
                store.put(entry.part, entry.owner, run._piece(entry, slot))
        elif item.kind == "gathered" and len(item.shape) == 1:
            hold_gathered(run, tensor, ("k", "v"))
        elif item.kind == "gathered":
            hold_gathered(run, tensor.view(-1), ("k",))
        elif item.kind == "lse":
            store.put("lse", job.node, Piece(0, job.rows, tensor))
        else:
            store.put(item.kind, item.owner, Piece(item.start, item.stop, tensor))


def _key_sums(run: Backward) -> Steps[tuple[Tensor, Tensor]]:
    """Return the sums of this node's keys and values, over all nodes."""
    job = run.job
    if not run.program.program.gather:
        return run.sums_of("dk"), run.sums_of("dv")
    flat = yield from scatter_sums(run, run.sums.to(job.shapes.grads))
    k, v = job.shapes.row("dk"), job.shapes.row("dv")
    cut = job.rows * job.shapes.elements("dk", "dkv")
    # Cloned: an operator may not return two views of one tensor.
    return flat[:cut].view(job.rows, *k), flat[cut:].clone().view(job.rows, *v)


def _results(run: Backward, dk: Tensor, dv: Tensor, sink: Tensor | None) -> Steps[Grads]:
    """Exchange the gradients back, and round them once."""
    job, dtype = run.job, run.job.shapes.dtype
    dsink = None if sink is None else _sink_gradient(run, sink)
    parts = [run.sums_of("dq").to(dtype), dk, dv]
    if job.exchanged:
        # Copies of a head are summed where they meet: until then they keep their digits.
        wire = job.shapes.grads if job.plan.heads.shared else dtype
        parts[1:] = [part.to(wire) for part in parts[1:]]
        back = yield from to_tokens(job, run.transport, parts, job.ranges)
        parts = list(back)
    q, k, v = (part.to(dtype) for part in parts)
    return Grads(q, k, v, dsink)


def _sink_gradient(run: Backward, sink: Tensor) -> Tensor:
    """Return - sum(exp(sink - lse) delta) of this place's heads, zeros for the others."""
    job = run.job
    first, last = job.plan.heads.q[job.place]
    own = (job.node, 0, job.rows)
    do, o, lse = (run.store.over(part, *own)[0].rows for part in ("do", "o", "lse"))
    sums = job.shapes.sums
    do, channels = do.to(sums), o.shape[-1]
    delta = (do[..., :channels] * o.to(sums)).sum(-1) + do[..., channels:].sum(-1)
    weight = torch.exp(sink[first:last].to(sums) - lse)
    grad = torch.zeros_like(sink)
    grad[first:last] = -(weight * delta).sum((0, 1)).to(sink.dtype)
    return grad


__all__ = ["Backward", "Grads", "backward_steps"]
