"""What forward keeps for backward, known from the plan alone.

Queries, output and log-sum-exp of the node, and the keys and values that the program does not
free: usually what arrived last. Without a head exchange the node's tensors are the process's own
inputs and output, and are not kept a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from .lower import notes
from .store import PARTS, Entry, Piece, Slot, Store, manifest

if TYPE_CHECKING:
    from .job import Job

SavedKind = Literal["q", "k", "v", "o", "lse", "message", "gathered"]


@dataclass(frozen=True)
class Saved:
    """One tensor of the state.

    Attributes:
        kind: "q", "o", "lse": of the node; "k", "v": rows [start, stop) of an owner; "message":
            a whole message; "gathered": keys and values of all nodes.
        shape: of the tensor.
        dtype: of the tensor.
        transfer: number of the message.
        owner: whose keys.
        start: first row.
        stop: the row after the last.
        entries: what of a message is still needed.
    """

    kind: SavedKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    transfer: int = -1
    owner: int = -1
    start: int = 0
    stop: int = 0
    entries: tuple[Entry, ...] = ()


def needs_inputs(job: Job) -> tuple[bool, bool, bool]:
    """Whether backward reads the process's own queries, keys and values as they were given."""
    if job.exchanged:
        keep = job.plan.kv_keep
        return False, keep in ("pre", "pre_k"), keep == "pre"
    if job.plan.forward.gather:
        return True, job.plan.kv_keep == "last", job.plan.kv_keep != "kv"
    known, key = notes(job.plan), ("own", job.rank)
    if key not in known:
        left, _ = remaining(job)
        known[key] = tuple(bool(left.pieces(part, job.node)) for part in PARTS["kv"])
    return True, *known[key]


def saved(job: Job) -> tuple[Saved, ...]:
    """Return the state that a rank keeps, in order."""
    if type(job.shapes.batch) is not int:
        return _saved(job)  # Traced with a size that is not known.
    known, key = notes(job.plan), ("saved", job.rank, job.shapes)
    if key not in known:
        known[key] = _saved(job)
    found: tuple[Saved, ...] = known[key]
    return found


def _saved(job: Job) -> tuple[Saved, ...]:
    shapes, rows = job.shapes, job.rows
    found = []
    if job.exchanged:
        found += [
            Saved(kind, (rows, *shapes.row(kind)), shapes.dtype, -1, job.node, 0, rows)
            for kind in _node_parts(job)
        ]
    found.append(Saved("lse", (rows, *shapes.row("lse")), shapes.sums))
    if job.plan.forward.gather:
        return (*found, *_gathered(job))
    store, slots = remaining(job)
    for index, slot in slots.items():
        transfer = job.plan.forward.transfers[index]
        kinds = {part for part in PARTS["kv"] if _in_slot(store, part, slot)}
        if kinds == {"k", "v"}:
            entries, size = manifest(transfer, shapes)
            left = tuple(e for e in entries if _held(store, e, slot))
            found.append(Saved("message", (size,), shapes.dtype, index, entries=left))
    for kind, owner, piece in store.all():
        if piece.slot is None and owner != job.node and kind in ("k", "v"):
            shape = (piece.stop - piece.start, *shapes.row(kind))
            one: SavedKind = "k" if kind == "k" else "v"
            found.append(Saved(one, shape, shapes.dtype, -1, owner, piece.start, piece.stop))
    return tuple(found)


def _node_parts(job: Job) -> list[SavedKind]:
    parts: list[SavedKind] = ["q", "o"]
    if job.plan.kv_keep in ("pre", "pre_k"):
        return parts if job.plan.kv_keep == "pre" else [*parts, "v"]
    if job.plan.forward.gather:
        own: dict[str, list[SavedKind]] = {"last": ["k", "v"], "k": ["v"], "kv": []}
        return parts + own[job.plan.kv_keep]
    store, _ = remaining(job)
    kept: list[SavedKind] = [p for p in ("k", "v") if store.pieces(p, job.node)]
    return parts + kept


def _gathered(job: Job) -> list[Saved]:
    shapes, plan = job.shapes, job.plan
    if plan.kv_keep == "k":
        shape = (plan.nodes.total, *shapes.row("k"))
        return [Saved("gathered", shape, shapes.dtype)]
    if plan.kv_keep == "kv":
        width = sum(shapes.elements(part, "kv") for part in PARTS["kv"])
        return [Saved("gathered", (plan.nodes.total * width,), shapes.dtype)]
    return []


def remaining(job: Job) -> tuple[Store, dict[int, Slot]]:
    """Return what a node holds at the end of forward, without any data, and whose message it is."""
    store = Store()
    nothing = torch.empty(0)
    slots: dict[int, Slot] = {}
    for part in PARTS["kv"]:
        store.put(part, job.node, Piece(0, job.rows, nothing))
    for step in job.plan.forward.steps[job.node]:
        for index in step.wait:
            transfer = job.plan.forward.transfers[index]
            entries, size = manifest(transfer, job.shapes)
            if transfer.buffers[0].what != "kv" or not size:
                continue
            slots[index] = Slot(index, nothing)
            for e in entries:
                store.put(e.part, e.owner, Piece(e.start, e.stop, nothing, slots[index]))
        for buffer in step.free:
            store.drop(PARTS[buffer.what], buffer.owner, buffer.start, buffer.stop)
        for buffer in step.free_v:
            store.drop_values(buffer.owner, buffer.start, buffer.stop)
    return store, {index: slot for index, slot in slots.items() if slot.pieces}


def _in_slot(store: Store, part: str, slot: Slot) -> bool:
    return any(p.slot is slot for kind, _, p in store.all() if kind == part)


def _held(store: Store, entry: Entry, slot: Slot) -> bool:
    rows = (entry.start, entry.stop)
    pieces = store.pieces(entry.part, entry.owner)
    return any(p.slot is slot and (p.start, p.stop) == rows for p in pieces)


__all__ = ["Saved", "needs_inputs", "remaining", "saved"]
