"""Buffers of an execution: who holds which rows of what, and which memory messages still use."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .plan import Transfer, What
from .trace import Event, Log

# What a buffer of a plan is made of; a message carries the parts one after the other.
PARTS: dict[What, tuple[str, ...]] = {
    "kv": ("k", "v"),
    "dkv": ("dk", "dv"),
    "q": ("q",),
    "o": ("o", "lse"),
    "qo": ("q", "o", "do", "lse"),
    "dq": ("dq",),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes and dtypes of one process's tensors at its node; rows come first everywhere.

    Attributes:
        batch: B.
        q_heads: query heads of this place, h.
        kv_heads: its key and value heads.
        channels: (D, Dv).
        dtype: of the inputs.
        sums: of accumulators and log-sum-exp.
        grads: of partial sums on their way to another rank.
        more: channels of the output's gradient beside Dv: 2 where the log-sum-exp has one too.
    """

    batch: int
    q_heads: int
    kv_heads: int
    channels: tuple[int, int]
    dtype: torch.dtype
    sums: torch.dtype
    grads: torch.dtype
    more: int = 0

    def row(self, part: str) -> tuple[int, ...]:
        """Return the shape of one row of a part."""
        if part == "lse":
            return (self.batch, self.q_heads)
        heads = self.kv_heads if part in ("k", "v", "dk", "dv") else self.q_heads
        channels = self.channels[part in ("v", "dv", "o", "do")]
        return (self.batch, heads, channels + self.more * (part == "do"))

    def message_dtype(self, what: What) -> torch.dtype:
        """Return the dtype in which a message carries it."""
        return self.grads if what in ("dkv", "o", "dq") else self.dtype

    def elements(self, part: str, what: What) -> int:
        """Number of elements of a message that one row of a part takes."""
        count = 1
        for size in self.row(part):
            count *= size
        ratio = self.sums.itemsize // self.message_dtype(what).itemsize if part == "lse" else 1
        return count * ratio


@dataclass(frozen=True)
class Entry:
    """Rows of a part inside a message: [start, stop) of `owner`, `size` elements at `offset`."""

    part: str
    owner: int
    start: int
    stop: int
    offset: int
    size: int


def manifest(transfer: Transfer, shapes: Shapes) -> tuple[tuple[Entry, ...], int]:
    """Return what a message holds, and its number of elements."""
    entries, at = [], 0
    for buffer in transfer.buffers:
        parts = (transfer.key,) if transfer.key else PARTS[buffer.what]
        for part in parts:
            size = (buffer.stop - buffer.start) * shapes.elements(part, buffer.what)
            entries.append(Entry(part, buffer.owner, buffer.start, buffer.stop, at, size))
            at += size
    return tuple(entries), at


@dataclass(eq=False)
class Slot:
    """Memory that messages use.

    Attributes:
        number: its name in the log.
        memory: flat tensor.
        kept: it belongs to the saved state, and is not used again.
        pieces: how many pieces are in it.
        transfer: the message that was received into it last.
        sends: messages under way from it: (transfer, handle, step by which it has arrived).
    """

    number: int
    memory: Tensor
    kept: bool = False
    pieces: int = 0
    transfer: int = -1
    sends: list[tuple[int, Any, int]] = field(default_factory=list)


@dataclass(eq=False)
class Piece:
    """Rows [start, stop) of a part of some owner; `slot` is the memory, if it is a slot's.

    `gone` counts the rows that are not needed any more.
    """

    start: int
    stop: int
    rows: Tensor
    slot: Slot | None = None
    gone: int = 0


class Pool:
    """Slots, used again as soon as no message needs them: a run holds as many as it must."""

    def __init__(self, like: Tensor, log: Log | None) -> None:
        self.like, self.log = like, log
        self.step = 0
        self._free: list[Slot] = []
        self._lingering: list[Slot] = []
        self._made = 0

    def note(self, event: Event) -> None:
        """Write an event into the log, if there is one."""
        if self.log is not None:
            self.log.append(event)

    def acquire(self, size: int, dtype: torch.dtype) -> Slot:
        """Return a slot of `size` elements or more."""
        fit = [s for s in self._free if s.memory.dtype == dtype and s.memory.numel() >= size]
        # Twice the size is more waste than a new slot.
        fit = [s for s in fit if s.memory.numel() <= 2 * size]
        if fit:
            slot = min(fit, key=lambda s: s.memory.numel())
            self._free.remove(slot)
            return slot
        return self.adopt(self.like.new_empty(size, dtype=dtype), kept=False)

    def adopt(self, memory: Tensor, *, kept: bool = True) -> Slot:
        """Return a slot for memory that comes from elsewhere, to be read only."""
        self._made += 1
        return Slot(self._made, memory, kept)

    def release(self, slot: Slot) -> None:
        """Give a slot back; it is free as soon as its messages have arrived."""
        if slot.sends:
            self._lingering.append(slot)
            return
        self.note(Event("free", self.step, reads=(slot.number,)))
        if not slot.kept:
            self._free.append(slot)

    def reap(self, step: int) -> Generator[Any, None, None]:
        """Free the slots that were given back and whose messages have arrived by now."""
        self.step = step
        for slot in list(self._lingering):
            if all(due <= step for _, _, due in slot.sends):
                yield from self.settle(slot)
                self._lingering.remove(slot)
                self.release(slot)

    def settle(self, slot: Slot) -> Generator[Any, None, None]:
        """Wait for the messages from a slot."""
        while slot.sends:
            transfer, handle, _ = slot.sends[0]
            yield handle
            slot.sends.pop(0)
            self.note(Event("done", self.step, transfer))

    def finish(self, used: Iterable[Slot]) -> Generator[Any, None, None]:
        """Wait for all messages."""
        for slot in (*self._lingering, *used):
            yield from self.settle(slot)


class Store:
    """Rows of every part, by owner."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], list[Piece]] = {}

    def put(self, part: str, owner: int, piece: Piece) -> None:
        """Add rows."""
        if piece.slot is not None:
            piece.slot.pieces += 1
        self._held.setdefault((part, owner), []).append(piece)

    def pieces(self, part: str, owner: int) -> list[Piece]:
        """Return all rows of an owner, piece by piece."""
        return self._held.get((part, owner), [])

    def one(self, part: str, owner: int, start: int, stop: int) -> Piece | None:
        """Return a piece that holds all of rows [start, stop), if there is one."""
        held = self.pieces(part, owner)
        return next((p for p in held if p.start <= start and stop <= p.stop), None)

    def over(self, part: str, owner: int, start: int, stop: int) -> list[Piece]:
        """Return the pieces that hold rows [start, stop), one if one holds them all.

        Raises:
            AssertionError: some of the rows are not here: the plan is wrong.
        """
        whole = self.one(part, owner, start, stop)
        if whole is not None:
            return [whole]
        found = [p for p in self.pieces(part, owner) if p.start < stop and start < p.stop]
        found.sort(key=lambda p: p.start)
        at = start
        for piece in found:
            assert piece.start <= at, f"rows {at} to {piece.start} of {part} of {owner} are missing"
            at = max(at, piece.stop)
        assert at >= stop, f"rows {at} to {stop} of {part} of {owner} are missing"
        return found

    def drop(self, parts: Sequence[str], owner: int, start: int, stop: int) -> list[Slot]:
        """Forget rows; return the slots that hold nothing any more."""
        empty = []
        for part in parts:
            left = []
            for piece in self.pieces(part, owner):
                piece.gone += max(0, min(stop, piece.stop) - max(start, piece.start))
                if piece.gone < piece.stop - piece.start:
                    left.append(piece)
                elif piece.slot is not None:
                    piece.slot.pieces -= 1
                    if not piece.slot.pieces:
                        empty.append(piece.slot)
            self._held[part, owner] = left
        return empty

    def drop_values(self, owner: int, start: int, stop: int) -> list[Slot]:
        """Forget values; keys that share a slot with them get memory of their own."""
        empty = []
        for piece in list(self.pieces("k", owner)):
            if piece.slot is not None and start <= piece.start and piece.stop <= stop:
                empty += self.drop(("k",), owner, piece.start, piece.stop)
                self.put("k", owner, Piece(piece.start, piece.stop, piece.rows.clone()))
        return [*empty, *self.drop(("v",), owner, start, stop)]

    def all(self) -> list[tuple[str, int, Piece]]:
        """Return (part, owner, piece) of everything, in a fixed order."""
        return [(*key, p) for key in sorted(self._held) for p in self._held[key]]

    def slots(self) -> list[Slot]:
        """Return the slots in use."""
        found = {
            p.slot.number: p.slot
            for held in self._held.values()
            for p in held
            if p.slot is not None
        }
        return list(found.values())


__all__ = ["PARTS", "Entry", "Piece", "Pool", "Shapes", "Slot", "Store", "manifest"]
