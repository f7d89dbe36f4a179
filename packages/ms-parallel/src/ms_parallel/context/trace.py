"""What an execution did, event by event, and what must be true of it.

The executor writes down every buffer it sends, receives into, reads, writes and gives back. From
the events of all ranks three properties follow for every possible timing of the links: no buffer
is touched while a message uses it, both ends of a pair name their messages in the same order, and
nobody waits for ever. A fourth is about speed: a message starts before the computation that is to
hide it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

EventKind = Literal["send", "receive", "done", "read", "write", "compute", "free"]


@dataclass
class Ledger:
    """What a rank has sent; its own part of a collective does not count.

    Attributes:
        bytes: all of it.
        messages: sends to one peer.
        collectives: calls of collectives.
    """

    bytes: int = 0
    messages: int = 0
    collectives: int = 0


@dataclass(frozen=True)
class Event:
    """Something that a rank did.

    Attributes:
        kind: "send" and "receive": a message starts; "done": it was awaited; "read", "write": of
            buffers outside of a computation; "compute": one call of attention; "free": the buffer
            may be used for something else.
        step: step of the program.
        transfer: number of the message's transfer, -1 for none.
        peer: rank at the other end.
        reads: numbers of the buffers that are read.
        writes: and of those that are written. Own inputs and results have no number.
        lane: messages of one step and lane start together.
    """

    kind: EventKind
    step: int
    transfer: int = -1
    peer: int = -1
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    lane: str = ""


Log = list[Event]


class TraceError(AssertionError):
    """An execution broke a rule; the message says which, where and by what."""


def check_trace(logs: Sequence[Log], p2p: str = "batched", ulysses: int = 1) -> None:
    """Check everything that is known about a forward or backward pass.

    Args:
        logs: the events of every rank.
        p2p: how messages start, as in `CPTopology`.
        ulysses: ranks of a node.

    Raises:
        TraceError: at the first rule that is broken.
    """
    for rank, log in enumerate(logs):
        check_races(log, rank)
        check_overlap(log, rank)
    check_order(logs)
    check_progress(logs, p2p, ulysses)


@dataclass
class _Use:
    """Messages under way from and into one buffer."""

    sends: set[int] = field(default_factory=set)
    receives: set[int] = field(default_factory=set)


def check_races(log: Log, rank: int = 0) -> None:
    """Check that no buffer is written, freed or read while a message uses it."""
    use: dict[int, _Use] = defaultdict(_Use)
    for event in log:
        if event.kind == "done":
            for one in use.values():
                one.sends.discard(event.transfer)
                one.receives.discard(event.transfer)
            continue
        for slot in event.reads:
            if use[slot].receives:
                _race(rank, event, "reads", slot, "receive", use[slot].receives)
        touched = event.writes if event.kind != "free" else event.reads
        for slot in touched:
            verb = "frees" if event.kind == "free" else "writes"
            if use[slot].sends:
                _race(rank, event, verb, slot, "send", use[slot].sends)
            if use[slot].receives:
                _race(rank, event, verb, slot, "receive", use[slot].receives)
        for slot in event.reads if event.kind == "send" else ():
            use[slot].sends.add(event.transfer)
        for slot in event.writes if event.kind == "receive" else ():
            use[slot].receives.add(event.transfer)
    left = [(s, u) for s, u in use.items() if u.sends or u.receives]
    if left:
        slot, one = left[0]
        found = sorted(one.sends | one.receives)
        raise TraceError(f"rank {rank}: transfers {found} of buffer {slot} were never awaited")


def _race(rank: int, event: Event, verb: str, slot: int, what: str, by: set[int]) -> None:
    raise TraceError(
        f"rank {rank}, step {event.step}: {event.kind} {verb} buffer {slot}"
        f" during the {what} of transfer {min(by)}"
    )


def check_overlap(log: Log, rank: int = 0) -> None:
    """Check that the messages of a step start before its computation, and end after it.

    What a step waits for after its computation may have started in the same step.
    """
    computed: dict[int, int] = {}
    for at, event in enumerate(log):
        if event.kind == "compute":
            computed.setdefault(event.step, at)
        if event.kind in ("send", "receive") and event.step in computed:
            raise TraceError(
                f"rank {rank}, step {event.step}: transfer {event.transfer} starts after the"
                " computation that should hide it"
            )
    started = {e.transfer: (e.step, at) for at, e in enumerate(log) if e.kind == "receive"}
    for at, event in enumerate(log):
        if event.kind != "done" or event.transfer not in started:
            continue
        step, begun = started[event.transfer]
        own = computed.get(step)
        if own is not None and begun < own and at < own:
            raise TraceError(
                f"rank {rank}, step {step}: transfer {event.transfer} is awaited before the"
                " computation that should hide it"
            )


def check_order(logs: Sequence[Log]) -> None:
    """Check that both ends of every pair start the same messages in the same order."""
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    received: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, log in enumerate(logs):
        for event in log:
            if event.kind == "send":
                sent[rank, event.peer].append(event.transfer)
            elif event.kind == "receive":
                received[event.peer, rank].append(event.transfer)
    for pair in sorted(sent.keys() | received.keys()):
        if sent[pair] != received[pair]:
            both = itertools.zip_longest(sent[pair], received[pair])
            a, b = next((x, y) for x, y in both if x != y)
            raise TraceError(
                f"ranks {pair[0]} -> {pair[1]}: one sends transfer {a} where the other receives {b}"
            )


class _Batch(NamedTuple):
    """Messages that a communicator starts together; the next batch waits for their end."""

    messages: frozenset[tuple[int, int, int]]  # (transfer, sender, receiver)


def check_progress(logs: Sequence[Log], p2p: str = "batched", ulysses: int = 1) -> None:
    """Check that every message ends, also on communicators that work strictly in order.

    Each rank has one queue of batches, or with "dual_group" two, by the parity of the sending
    node. A message can move when it is in the first batch of a queue at both its ends.
    """
    queues = _queues(logs, p2p, ulysses)
    moving = True
    while moving:
        moving = False
        heads = [m for queue in queues.values() if queue for m in queue[0].messages]
        ready = {m for m in heads if heads.count(m) == 2}
        for queue in queues.values():
            # A batch ends when all of it has; messages that are through stay counted in `ready`.
            while queue and queue[0].messages <= ready:
                queue.popleft()
                moving = True
            if queue and queue[0].messages & ready:
                left = queue[0].messages - ready
                moving = moving or left != queue[0].messages
                queue[0] = _Batch(left)
    stuck = {key: queue for key, queue in queues.items() if queue}
    if stuck:
        (rank, _), queue = min(stuck.items())
        waits = sorted(m[0] for m in queue[0].messages)
        ranks = sorted({r for r, _ in stuck})
        raise TraceError(f"deadlock of ranks {ranks}: rank {rank} waits for transfers {waits}")


def _queues(logs: Sequence[Log], p2p: str, ulysses: int) -> dict[tuple[int, int], deque[_Batch]]:
    queues: dict[tuple[int, int], deque[_Batch]] = defaultdict(deque)
    for rank, log in enumerate(logs):
        posts = [e for e in log if e.kind in ("send", "receive")]
        for _, lane in itertools.groupby(posts, key=lambda e: (e.step, e.lane)):
            batches: dict[int, set[tuple[int, int, int]]] = defaultdict(set)
            for message in (_ends(rank, event) for event in lane):
                sender = message[1] // ulysses
                batches[sender % 2 if p2p == "dual_group" else 0].add(message)
            for group, batch in batches.items():
                queues[rank, group].append(_Batch(frozenset(batch)))
    return queues


def _ends(rank: int, event: Event) -> tuple[int, int, int]:
    """Return (transfer, sender, receiver)."""
    if event.kind == "send":
        return event.transfer, rank, event.peer
    return event.transfer, event.peer, rank


__all__ = [
    "Event",
    "Ledger",
    "Log",
    "TraceError",
    "check_order",
    "check_overlap",
    "check_progress",
    "check_races",
    "check_trace",
]
