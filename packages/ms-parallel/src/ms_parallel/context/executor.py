"""One direction of a plan on one rank: messages, waiting, calls of attention, buffers.

`Run` is what forward and backward share: it walks through the node's steps and moves data as they
say. It is a generator that yields what it has to wait for, so that the same code runs over a
process group (`transport.run`) and for all ranks at once in one process (`simulate`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import Call, Rows
from .job import Job
from .lower import Direction, lower
from .plan import Buffer, Transfer
from .store import PARTS, Entry, Piece, Pool, Slot, Store, manifest
from .trace import Event, Log
from .transport import Handle, Message, Steps, Transport, in_order


class Run:
    """One direction of a plan on one rank."""

    def __init__(
        self, job: Job, direction: Direction, transport: Transport, log: Log | None
    ) -> None:
        self.job, self.transport = job, transport
        self.program = lower(job.plan, direction, job.node, job.device, job.scoring.by_position)
        self.store = Store()
        self.like = torch.empty(0, dtype=job.shapes.dtype, device=job.device)
        self.pool = Pool(self.like, log)
        self.step = 0
        self.idle = 0 in (job.shapes.batch, job.shapes.q_heads)
        self._receiving: dict[int, tuple[Handle, Slot]] = {}

    def walk(self) -> Steps[None]:
        """Go through the steps."""
        for t, lowered in enumerate(self.program.steps):
            self.step = t
            step = lowered.step
            yield from self._receive(step.wait)
            yield from self.pool.reap(t)
            self._post(step.post)
            for call in () if self.idle else lowered.calls:
                self.compute(call)
            yield from self._receive(step.wait_after)
            for buffer in step.free:
                self._drop(PARTS[buffer.what], buffer.owner, buffer.start, buffer.stop)
            for buffer in step.free_v:
                self._drop_values(buffer)
        yield from self.pool.finish(self.store.slots())

    def compute(self, call: Call) -> None:
        """Run one call of attention and add what it gives."""
        raise NotImplementedError

    def arrived(self, transfer: Transfer, entries: Sequence[Entry], slot: Slot) -> None:
        """Take a message."""
        for entry in entries:
            self.store.put(entry.part, entry.owner, self._piece(entry, slot))

    def outgoing(self, transfer: Transfer, entries: Sequence[Entry]) -> Sequence[Tensor]:
        """Return the rows that a message carries, entry by entry."""
        return [self._rows(e.part, e.owner, e.start, e.stop) for e in entries]

    def before_sending(self, transfer: Transfer) -> None:
        """Make what a message carries, if it is not there yet."""

    def sent(self, transfer: Transfer) -> Sequence[Slot]:
        """Forget what a message took along; return the slots that are empty now."""
        return ()

    # Messages

    def _post(self, indices: Sequence[int]) -> None:
        messages: list[Message] = []
        sends: list[tuple[Transfer, Slot]] = []
        receives: dict[int, Slot] = {}
        for index in indices:
            transfer = self.program.program.transfers[index]
            entries, size = manifest(transfer, self.job.shapes)
            if not size:
                continue  # A place without heads.
            sending = transfer.src == self.job.node
            if sending:
                self.before_sending(transfer)
                slot, memory = self._packed(transfer, entries, size)
                sends.append((transfer, slot))
            else:
                dtype = self.job.shapes.message_dtype(transfer.buffers[0].what)
                slot = receives[index] = self.pool.acquire(size, dtype)
                slot.transfer, memory = index, slot.memory[:size]
            messages.append(self._message(transfer, memory, sending))
        used = receives | {transfer.index: slot for transfer, slot in sends}
        for message in in_order(messages):
            self._note_message(message, used[message.index])
        handles = self.transport.post(messages) if messages else {}
        self._receiving |= {index: (handles[index], slot) for index, slot in receives.items()}
        for transfer, slot in sends:
            due = self.program.due[transfer.index]
            slot.sends.append((transfer.index, handles[transfer.index], due))
            empty = {*self.sent(transfer), *(() if slot.pieces else (slot,))}
            for one in empty:
                self.pool.release(one)

    def _message(self, transfer: Transfer, memory: Tensor, sending: bool) -> Message:
        node = transfer.dst if sending else transfer.src
        peer = node * self.job.plan.ulysses + self.job.place
        what = transfer.buffers[0].what
        lane = f"{transfer.level}/{what}/{transfer.key}"
        return Message(transfer.index, peer, memory, sending, lane)

    def _packed(
        self, transfer: Transfer, entries: Sequence[Entry], size: int
    ) -> tuple[Slot, Tensor]:
        """Return the message's content: in place if it lies so in one slot, else copied."""
        found = self._in_place(entries, size)
        if found is not None:
            return found
        dtype = self.job.shapes.message_dtype(transfer.buffers[0].what)
        slot = self.pool.acquire(size, dtype)
        self.note(Event("write", self.step, transfer.index, writes=(slot.number,)))
        for entry, rows in zip(entries, self.outgoing(transfer, entries), strict=True):
            into = slot.memory[entry.offset : entry.offset + entry.size]
            if entry.part == "lse":
                into.copy_(rows.contiguous().view(-1).view(dtype))
            else:
                into.view(rows.shape).copy_(rows)
        return slot, slot.memory[:size]

    def _in_place(self, entries: Sequence[Entry], size: int) -> tuple[Slot, Tensor] | None:
        first = None
        for entry in entries:
            held = self.store.pieces(entry.part, entry.owner)
            piece = next((p for p in held if (p.start, p.stop) == (entry.start, entry.stop)), None)
            if piece is None or piece.slot is None or entry.part == "lse":
                return None
            at = piece.rows.storage_offset() - piece.slot.memory.storage_offset()
            first = first or (piece.slot, at)
            if first != (piece.slot, at - entry.offset):
                return None
        assert first is not None
        slot, at = first
        return slot, slot.memory[at : at + size]

    def _receive(self, indices: Sequence[int]) -> Steps[None]:
        for index in indices:
            if index not in self._receiving:
                continue  # Nothing to send: a place without heads.
            handle, slot = self._receiving.pop(index)
            yield handle
            self.note(Event("done", self.step, index))
            transfer = self.program.program.transfers[index]
            entries, _ = manifest(transfer, self.job.shapes)
            self.arrived(transfer, entries, slot)
            if not slot.pieces:
                self.pool.release(slot)

    # Rows

    def _piece(self, entry: Entry, slot: Slot) -> Piece:
        row = self.job.shapes.row(entry.part)
        memory = slot.memory[entry.offset : entry.offset + entry.size]
        if entry.part == "lse":
            # Bytes of another dtype: a copy of their own is aligned for it.
            rows = memory.clone().view(self.job.shapes.sums).view(-1, *row)
            return Piece(entry.start, entry.stop, rows)
        return Piece(entry.start, entry.stop, memory.view(-1, *row), slot)

    def _rows(self, part: str, owner: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of an owner: a view if one piece holds them."""
        cut = [
            p.rows[max(start, p.start) - p.start : min(stop, p.stop) - p.start]
            for p in self.store.over(part, owner, start, stop)
        ]
        return cut[0] if len(cut) == 1 else torch.cat(cut)

    def take(self, part: str, rows: Rows) -> Tensor:
        """Return the rows that a call reads."""
        whole = self.store.one(part, rows.owner, rows.low, rows.high)
        if whole is None or rows.index is None:
            cut = [self._rows(part, rows.owner, a, b) for a, b in rows.ranges]
            return cut[0] if len(cut) == 1 else torch.cat(cut)
        window = whole.rows[rows.low - whole.start : rows.high - whole.start]
        return window.index_select(0, rows.index)

    def take_keys(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a call."""
        k, v = ([self.take(part, rows) for rows in call.kv] for part in ("k", "v"))
        return (k[0], v[0]) if len(k) == 1 else (torch.cat(k), torch.cat(v))

    def _drop(self, parts: Sequence[str], owner: int, start: int, stop: int) -> None:
        for slot in self.store.drop(parts, owner, start, stop):
            self.pool.release(slot)

    def _drop_values(self, buffer: Buffer) -> None:
        at = (buffer.owner, buffer.start, buffer.stop)
        held = [p.slot.number for p in self.store.over("k", *at) if p.slot is not None]
        self.note(Event("read", self.step, reads=tuple(held)))
        for slot in self.store.drop_values(*at):
            self.pool.release(slot)

    # Log

    def note(self, event: Event) -> None:
        """Write an event into the log, if there is one."""
        self.pool.note(event)

    def _note_message(self, message: Message, slot: Slot) -> None:
        at = (slot.number,)
        where = (self.step, message.index, message.peer)
        if message.sends:
            self.note(Event("send", *where, reads=at, lane=message.lane))
        else:
            self.note(Event("receive", *where, writes=at, lane=message.lane))

    def note_call(self, call: Call) -> None:
        """Write down which slots a call reads and writes."""
        if self.pool.log is None:
            return
        reads = self._slots(("k", "v"), call.kv) | self._slots(("q",), (call.q,))
        writes = self._slots(("dk", "dv"), call.kv)
        self.note(Event("compute", self.step, reads=tuple(reads), writes=tuple(writes)))

    def _slots(self, parts: Sequence[str], rows: Sequence[Rows]) -> set[int]:
        found = set()
        for part in parts:
            for run in rows:
                for piece in self.store.pieces(part, run.owner):
                    touched = piece.start < run.high and run.low < piece.stop
                    if piece.slot is not None and touched:
                        found.add(piece.slot.number)
        return found


__all__ = ["Run"]
