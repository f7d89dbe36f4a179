"""What the planner decides, as plain data: events of a step, sites, and ways to treat each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that are alive during the events [start, stop) of a step."""

    start: int
    stop: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Option:
    """One way to treat a site.

    Attributes:
        name: "keep", "recompute", "discard", "swap", or a combination of the parts of a site.
        spans: bytes on the device and when; spans of one option add up where they overlap.
        time: nanoseconds that it adds to the step.
        host: pinned bytes on the host.
        actions: what is to be installed: (part of the site, action).
        stall: how much of `time` waits for copies.
    """

    name: str
    spans: tuple[Span, ...]
    time: int = 0
    host: int = 0
    actions: tuple[tuple[str, str], ...] = ()
    stall: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """What is decided at once, a layer as a rule. The first option is what happens unplanned."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Problem:
    """A step: its events in order, the bytes alive whatever is chosen, and the choices.

    Attributes:
        events: names, in order of time.
        base: bytes per event: parameters, gradients, optimizer state, buffers, workspaces.
        sites: in the order of forward.
        min_bytes: storages below are not swapped.
    """

    events: tuple[str, ...]
    base: tuple[int, ...]
    sites: tuple[Site, ...]
    min_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.base) != len(self.events):
            raise ValueError(f"Problem: base: got {len(self.base)} entries, need one an event")
        for site in self.sites:
            if not site.options:
                raise ValueError(f"Problem: site {site.name}: got no option, need one at least")
            for option in site.options:
                _check(option, f"site {site.name}, option {option.name}", len(self.events))

    @cached_property
    def uses(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Bytes of every option at every event: `uses[site][option][event]`."""
        size = len(self.events)
        return tuple(tuple(_dense(o, size) for o in site.options) for site in self.sites)

    def live(self, picks: Sequence[int]) -> tuple[int, ...]:
        """Replay a plan: the bytes alive at every event.

        Args:
            picks: index of the chosen option of every site.
        """
        columns = [uses[pick] for uses, pick in zip(self.uses, picks, strict=True)]
        return tuple(sum(at, base) for base, *at in zip(self.base, *columns, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return lists, strings and integers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Problem:
        """Read what `as_dict` gave."""
        sites = tuple(
            Site(site["name"], tuple(option_from_dict(o) for o in site["options"]))
            for site in data["sites"]
        )
        return cls(tuple(data["events"]), tuple(data["base"]), sites, data["min_bytes"])


def option_from_dict(data: Mapping[str, Any]) -> Option:
    """Read an option of `Problem.as_dict`."""
    return Option(
        data["name"],
        tuple(Span(**span) for span in data["spans"]),
        data["time"],
        data["host"],
        tuple((part, action) for part, action in data["actions"]),
        data["stall"],
    )


def _check(option: Option, where: str, events: int) -> None:
    numbers = [option.time, option.host, option.stall, *(span.nbytes for span in option.spans)]
    if any(not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError(f"Problem: {where}: got {numbers}, need integers that are not negative")
    for span in option.spans:
        if not 0 <= span.start <= span.stop <= events:
            raise ValueError(
                f"Problem: {where}: got span [{span.start}, {span.stop}),"
                f" need one within [0, {events})"
            )


def _dense(option: Option, size: int) -> tuple[int, ...]:
    live = [0] * size
    for span in option.spans:
        for event in range(span.start, span.stop):
            live[event] += span.nbytes
    return tuple(live)


@dataclass(frozen=True, slots=True)
class LayerOption:
    """An option of a layer of a chain: what it costs in each phase.

    Attributes:
        name: as in `Option`.
        held: bytes kept from the layer's forward to its backward, a micro-batch.
        forward: most bytes alive during the layer's own forward, beyond what other layers hold.
        backward: likewise during its own backward; a recomputation's bytes are among them.
        leaving: bytes that are on their way to the host while the next layer's forward runs, and
            on their way back during the next layer's backward.
        time: nanoseconds added, but for the stalls that follow from the next two.
        out_time: nanoseconds of the copies to the host. What the next layer's forward is too short
            to hide is a stall: its own copies come after, so that nothing piles up.
        back_time: of those back, hidden by the next layer's backward.
        host: pinned bytes a micro-batch.
        actions: as in `Option`.
    """

    name: str
    held: int
    forward: int
    backward: int
    leaving: int = 0
    time: int = 0
    out_time: int = 0
    back_time: int = 0
    host: int = 0
    actions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a chain.

    Attributes:
        name: of it.
        options: what can be done.
        in_flight: micro-batches between its forward and backward.
        forward_time: nanoseconds that it computes at least, which hide the previous layer's copies.
        backward_time: likewise in backward.
    """

    name: str
    options: tuple[LayerOption, ...]
    in_flight: int = 1
    forward_time: int = 0
    backward_time: int = 0


def chain(
    layers: Sequence[Layer],
    base: int | Sequence[int] = 0,
    *,
    step: int | None = None,
    min_bytes: int = 0,
) -> Problem:
    """Build the problem of layers that run one after the other, and backward in reverse.

    Events: forward of every layer, backward of every layer in reverse, and the optimizer's step.
    With several micro-batches in flight the last of them is followed while the others are held,
    which is when a pipeline's steady phase has its peak.

    Args:
        layers: in the order of forward.
        base: bytes alive whatever is chosen, for all events or one number for each of the
            2 L + 1 events.
        step: bytes alive in the optimizer's step; None: as `base` says.
        min_bytes: as in `Problem`.
    """
    count = len(layers)
    names = [layer.name for layer in layers]
    events = [f"forward {n}" for n in names] + [f"backward {n}" for n in reversed(names)]
    static = [base] * (2 * count + 1) if isinstance(base, int) else list(base)
    if step is not None:
        static[-1] = step
    followers = (*layers[1:], Layer("", ()))
    sites = (
        Site(
            one.name, tuple(_spans(o, i, count, one.in_flight, _stall(o, nxt)) for o in one.options)
        )
        for i, (one, nxt) in enumerate(zip(layers, followers, strict=True))
    )
    return Problem((*events, "optimizer step"), tuple(static), tuple(sites), min_bytes)


def _stall(option: LayerOption, follower: Layer) -> int:
    """Return how long the copies of a layer at most hold up the layers after it."""
    out = max(0, option.out_time - follower.forward_time)
    return out + max(0, option.back_time - follower.backward_time)


def _spans(option: LayerOption, place: int, count: int, in_flight: int, stall: int) -> Option:
    first, last = place, 2 * count - 1 - place  # the layer's forward and backward
    spans = [
        Span(first, first + 1, option.forward),
        Span(first + 1, last, option.held),
        Span(last, last + 1, option.backward),
        Span(0, 2 * count, (in_flight - 1) * option.held),
    ]
    if place + 1 < count:
        spans += [Span(first + 1, first + 2, option.leaving), Span(last - 1, last, option.leaving)]
    kept = tuple(span for span in spans if span.nbytes and span.stop > span.start)
    time = (option.time + stall) * in_flight
    host = option.host * in_flight
    return Option(option.name, kept, time, host, option.actions, stall * in_flight)
