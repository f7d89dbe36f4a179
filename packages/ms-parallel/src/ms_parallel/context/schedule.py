"""From work and hops with their times to a program: numbers messages, fills steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .plan import Block, Buffer, Program, Step, Transfer


class Hop(NamedTuple):
    """Buffers of one kind on their way from a node to another.

    Attributes:
        src: node that sends.
        dst: node that receives.
        post: step in which both start.
        wait: step in which the receiver has it.
        buffers: what travels.
        level: link.
        key: "" for K and V together, "k" or "v" for one of them.
        after: the receiver awaits it after its blocks of that step, not before.
    """

    src: int
    dst: int
    post: int
    wait: int
    buffers: tuple[Buffer, ...]
    level: Literal["ring", "inner", "outer"] = "ring"
    key: Literal["", "k", "v"] = ""
    after: bool = False


@dataclass
class Schedule:
    """What has been planned so far.

    Attributes:
        nodes: number of nodes.
        blocks: by (node, step).
        hops: in any order; those that agree in all but the rows become one message.
        free: buffers by (node, step).
        free_v: likewise, of which only the values go.
    """

    nodes: int
    blocks: dict[tuple[int, int], tuple[Block, ...]] = field(default_factory=dict)
    hops: list[Hop] = field(default_factory=list)
    free: dict[tuple[int, int], list[Buffer]] = field(default_factory=lambda: defaultdict(list))
    free_v: dict[tuple[int, int], list[Buffer]] = field(default_factory=lambda: defaultdict(list))

    def program(self) -> Program:
        """Return the program, without the steps in which no node has anything to do."""
        used = {t for (_, t), blocks in self.blocks.items() if blocks}
        used |= {t for hop in self.hops for t in (hop.post, hop.wait)}
        place = {t: i for i, t in enumerate(sorted(used) or [0])}
        messages = self._messages(place)
        post: dict[tuple[int, int], list[int]] = defaultdict(list)
        wait: dict[tuple[int, int], list[int]] = defaultdict(list)
        after: dict[tuple[int, int], list[int]] = defaultdict(list)
        for message, start, end, late in messages:
            post[message.src, start].append(message.index)
            post[message.dst, start].append(message.index)
            (after if late else wait)[message.dst, end].append(message.index)
        blocks = {(n, place[t]): b for (n, t), b in self.blocks.items() if b}
        free, free_v = self._moved(self.free, place), self._moved(self.free_v, place)
        steps = tuple(
            tuple(
                Step(
                    tuple(wait[n, t]), tuple(post[n, t]), blocks.get((n, t), ()),
                    tuple(after[n, t]), tuple(free[n, t]), tuple(free_v[n, t]),
                )
                for t in range(len(place))
            )
            for n in range(self.nodes)
        )  # fmt: skip
        return Program(steps, tuple(m for m, *_ in messages))

    def _messages(self, place: Mapping[int, int]) -> list[tuple[Transfer, int, int, bool]]:
        grouped: dict[tuple[object, ...], list[Hop]] = defaultdict(list)
        for hop in self.hops:
            key = (*hop[:4], hop.buffers[0].what, *hop[5:])
            grouped[key].append(hop)
        ordered = sorted(
            grouped.values(), key=lambda g: (g[0].post, g[0].wait, g[0].src, g[0].dst, g[0][4:])
        )
        out = []
        for index, hops in enumerate(ordered):
            h = hops[0]
            buffers = tuple(sorted(buffer for hop in hops for buffer in hop.buffers))
            message = Transfer(index, h.src, h.dst, buffers, h.level, h.key)
            out.append((message, place[h.post], place[h.wait], h.after))
        return out

    @staticmethod
    def _moved(
        given: Mapping[tuple[int, int], Sequence[Buffer]], place: Mapping[int, int]
    ) -> dict[tuple[int, int], list[Buffer]]:
        """Move what is due in a step that is left out to the one before it."""
        kept = sorted(place)
        out: dict[tuple[int, int], list[Buffer]] = defaultdict(list)
        for (node, step), buffers in given.items():
            before = max((t for t in kept if t <= step), default=kept[0])
            out[node, place[before]] += buffers
        for buffers in out.values():
            buffers.sort()
        return out
