"""The part of `verify` that runs a plan's programs with intervals for buffers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .plan import AttnPlan, Block, Buffer, Program, Transfer

# What a message holds, as parts that can be freed one by one.
PARTS = {"kv": ("k", "v"), "q": ("q",), "qo": ("qo",)}
# Partial sums and whose rows they are of.
SUMS = ("dkv", "o", "dq")


class Held:
    """The buffers of one node: parts of intervals, never joined again once they are apart."""

    def __init__(self) -> None:
        """Hold nothing."""
        self.parts: dict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)

    def put(self, part: str, buffer: Buffer) -> None:
        """Add an interval, which must not be there yet."""
        held = self.parts[part, buffer.owner]
        twice = any(a < buffer.stop and buffer.start < b for a, b in held)
        expect(not twice, "{} of {} received while it is there", part, buffer)
        held.add((buffer.start, buffer.stop))

    def find(self, part: str, owner: int, start: int, stop: int) -> tuple[int, int] | None:
        """Return the held interval around [start, stop), or None."""
        held = self.parts[part, owner]
        if (start, stop) in held:
            return start, stop
        return next(((a, b) for a, b in held if a <= start and stop <= b), None)

    def drop(self, part: str, buffer: Buffer) -> None:
        """Free an interval that must be there."""
        around = self.find(part, buffer.owner, buffer.start, buffer.stop)
        if around is None:
            raise AssertionError(f"{part} of {buffer} freed, but not held")
        held = self.parts[part, buffer.owner]
        held.remove(around)
        rest = (around[0], buffer.start), (buffer.stop, around[1])
        held.update((a, b) for a, b in rest if a < b)


class Sums:
    """Partial sums of one node: which block has added to which rows of whom."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self.added: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
        self.sent: dict[tuple[str, int], list[Buffer]] = defaultdict(list)

    def add(self, what: str, owner: int, entries: Iterable[tuple[int, int, int]]) -> None:
        """Add (block, start, stop)."""
        self.added[what, owner] += entries

    def take(self, buffer: Buffer) -> list[tuple[int, int, int]]:
        """Remove and return what has been added to the rows of a buffer."""
        inside, outside = [], []
        for block, start, stop in self.added[buffer.what, buffer.owner]:
            a, b = max(start, buffer.start), min(stop, buffer.stop)
            if a >= b:
                outside.append((block, start, stop))
                continue
            inside.append((block, a, b))
            outside += [(block, x, y) for x, y in ((start, a), (b, stop)) if x < y]
        self.added[buffer.what, buffer.owner] = outside
        return inside


class Run:
    """One program, all nodes in step.

    Args:
        plan: the plan.
        program: its forward or its backward.
        held: the buffers of every node at the start.
        backward: whether gradients are what is computed.
    """

    def __init__(self, plan: AttnPlan, program: Program, held: list[Held], backward: bool) -> None:
        """Start before the first step."""
        self.plan, self.program, self.held, self.backward = plan, program, held, backward
        self.sums = [Sums() for _ in held]
        self.payload: dict[int, list[tuple[Buffer, list[tuple[int, int, int]]]]] = {}
        # By part and owner what a node reads for others, and until the end of which step.
        self.reading: list[dict[tuple[str, int], list[tuple[Buffer, int]]]] = [
            defaultdict(list) for _ in held
        ]
        self.due = {
            i: t - 1 if i in step.wait else t
            for steps in program.steps
            for t, step in enumerate(steps)
            for i in (*step.wait, *step.wait_after)
        }
        self.blocks: list[Block] = []

    def run(self) -> None:
        """Run all steps, and check that all sums are where they belong."""
        for t in range(len(self.program.steps[0])):
            now = [steps[t] for steps in self.program.steps]
            for node, step in enumerate(now):
                self._arrive(node, step.wait)
            for node, step in enumerate(now):
                self._post(node, step.post)
            for node, step in enumerate(now):
                for block in step.blocks:
                    self._compute(node, block)
            for node, step in enumerate(now):
                self._arrive(node, step.wait_after)
            for node, step in enumerate(now):
                for buffer in step.free:
                    self._free(node, buffer, PARTS.get(buffer.what, (buffer.what,)), t)
                for buffer in step.free_v:
                    self._free(node, buffer, ("v",), t)
        self._finish()

    def _arrive(self, node: int, indexes: Iterable[int]) -> None:
        for index in indexes:
            transfer = self.program.transfers[index]
            for buffer, entries in self.payload.pop(index):
                if buffer.what in SUMS:
                    self.sums[node].add(buffer.what, buffer.owner, entries)
                for part in self._parts(transfer, buffer):
                    self.held[node].put(part, buffer)

    def _parts(self, transfer: Transfer, buffer: Buffer) -> tuple[str, ...]:
        return (transfer.key,) if transfer.key else PARTS.get(buffer.what, ())

    def _post(self, node: int, indexes: Iterable[int]) -> None:
        for index in indexes:
            transfer = self.program.transfers[index]
            if transfer.src != node:
                continue
            payload = self.payload[index] = []
            for buffer in transfer.buffers:
                for part in self._parts(transfer, buffer):
                    where = buffer.owner, buffer.start, buffer.stop
                    expect(
                        self.held[node].find(part, *where) is not None,
                        "node {} sends {} of {}, which it does not have",
                        node,
                        part,
                        buffer,
                    )
                    self._read(node, part, buffer, index)
                if buffer.what in SUMS:
                    self.sums[node].sent[buffer.what, buffer.owner].append(buffer)
                    self._read(node, buffer.what, buffer, index)
                entries = self.sums[node].take(buffer) if buffer.what in SUMS else []
                payload.append((buffer, entries))

    def _read(self, node: int, part: str, buffer: Buffer, index: int) -> None:
        self.reading[node][part, buffer.owner].append((buffer, self.due[index]))

    def _compute(self, node: int, block: Block) -> None:
        number = len(self.blocks)
        self.blocks.append(block)
        for part in ("k", "v"):
            around = self.held[node].find(part, block.kv_owner, block.k0, block.k1)
            expect(around is not None, "node {} has no {} for {} in one buffer", node, part, block)
        results = [("dkv", block.kv_owner, block.k0, block.k1)] if self.backward else []
        if block.q_owner != node:
            part = "qo" if self.backward else "q"
            around = self.held[node].find(part, block.q_owner, block.q0, block.q1)
            expect(around is not None, "node {} has no {} for {} in one buffer", node, part, block)
        results.append(("dq" if self.backward else "o", block.q_owner, block.q0, block.q1))
        for what, owner, start, stop in results:
            sent = self.sums[node].sent[what, owner]
            late = any(b.start < stop and start < b.stop for b in sent)
            expect(not late, "node {} adds to {} after sending it: {}", node, what, block)
            self.sums[node].add(what, owner, [(number, start, stop)])

    def _free(self, node: int, buffer: Buffer, parts: Iterable[str], t: int) -> None:
        for part in parts:
            for read, until in self.reading[node][part, buffer.owner]:
                clash = read.start < buffer.stop and buffer.start < read.stop and t < until
                expect(not clash, "node {} frees {} of {} while it is sent", node, part, buffer)
            if part in SUMS:
                self.sums[node].take(buffer)
            else:
                self.held[node].drop(part, buffer)

    def _finish(self) -> None:
        expect(not self.payload, "messages {} never awaited", sorted(self.payload))
        got: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for node, sums in enumerate(self.sums):
            for (what, owner), entries in sums.added.items():
                for number, start, stop in entries:
                    expect(
                        owner == node, "{} of {} stays at node {}", what, self.blocks[number], node
                    )
                    got[what, number].append((start, stop))
        for number, block in enumerate(self.blocks):
            rows = {"dq" if self.backward else "o": (block.q0, block.q1)}
            if self.backward:
                rows["dkv"] = block.k0, block.k1
            for what, (start, stop) in rows.items():
                at = start
                for a, b in sorted(got[what, number]):
                    expect(a == at, "{} of {} is not summed once", what, block)
                    at = b
                expect(at == stop, "{} of {} is not summed once", what, block)


def check_data(plan: AttnPlan) -> None:
    """Run both programs, the backward one from what forward leaves."""
    if plan.forward.gather:
        silent = not plan.forward.transfers and not plan.backward.transfers
        expect(silent and plan.backward.gather, "a gather with messages")
        return
    held = [Held() for _ in range(plan.nodes.size)]
    for node, length in enumerate(plan.nodes.lengths):
        if length:
            # Queries, and in backward what goes with them, are always at their owner.
            for part in ("k", "v", "q", "qo"):
                held[node].put(part, Buffer("kv", node, 0, length))
    Run(plan, plan.forward, held, False).run()
    Run(plan, plan.backward, held, True).run()


def expect(condition: bool, message: str, *values: object) -> None:
    """Raise AssertionError with `message`, values put in, unless the condition holds."""
    if not condition:
        raise AssertionError(message.format(*values))
