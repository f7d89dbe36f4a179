"""Measure what every way to treat a layer costs: each is tried on all layers at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..device import Sim
from ..device.probe import Rates, probe
from ..errors import MemoryFeatureError, refuse
from ..recompute.match import matched
from ..session import Session
from .measure import Clock, Phase, record
from .options import Run, layers_of
from .parts import PARTS, Combination, Part, combinations, install
from .problem import Layer, LayerOption, Problem, chain

log = logging.getLogger("ms_memory")

ACTIONS = ("discard", "recompute", "swap")
MIN_BYTES = 524_288


@dataclass(frozen=True)
class Profile:
    """What was measured, for `solve`.

    Attributes:
        layers: with their options, the outermost first: what comes before the layers ("begin"),
            the layers, and what comes after them ("between": head and loss).
        base: bytes alive when a step begins: parameters and buffers.
        step: bytes alive when it has ended: gradients as well.
        input_bytes: of the tensors that the model was given; a plan holds for inputs up to this.
        min_bytes: storages below are not swapped.
    """

    layers: tuple[Layer, ...]
    base: int
    step: int
    input_bytes: int
    min_bytes: int = MIN_BYTES

    def problem(self, *, in_flight: int = 1, extra: int = 0) -> Problem:
        """Return what `solve` takes.

        Args:
            in_flight: micro-batches between their forward and backward. With several, gradients
                count as alive all the time.
            extra: bytes alive all the time that the step does not show: optimizer state,
                communication buffers.
        """
        layers = [replace(layer, in_flight=in_flight) for layer in self.layers]
        base = self.base if in_flight == 1 else self.step
        return chain(layers, base + extra, step=self.step + extra, min_bytes=self.min_bytes)

    def scaled(self, compute: float, copies: float = 1.0) -> Profile:
        """Return the profile of a device that takes other times.

        Args:
            compute: how many times as long to compute.
            copies: how many times as long to copy to and from the host.
        """

        def option(one: LayerOption) -> LayerOption:
            return replace(
                one,
                time=round(one.time * compute),
                out_time=round(one.out_time * copies),
                back_time=round(one.back_time * copies),
            )

        def layer(one: Layer) -> Layer:
            return replace(
                one,
                options=tuple(map(option, one.options)),
                forward_time=round(one.forward_time * compute),
                backward_time=round(one.backward_time * compute),
            )

        return replace(self, layers=tuple(map(layer, self.layers)))

    @staticmethod
    def merged(profiles: Sequence[Profile]) -> Profile:
        """Return the largest of every number, the smallest of what hides copies.

        Args:
            profiles: of one model in several processes, which are to have one plan.

        Raises:
            ValueError: their layers or options differ.
        """
        kinds = {
            tuple((la.name, *(o.name for o in la.options)) for la in p.layers) for p in profiles
        }
        if len(kinds) != 1 or len({p.min_bytes for p in profiles}) != 1:
            raise ValueError("merged: profiles: got other layers or options, need the same")
        layers = tuple(map(_merged_layer, zip(*(p.layers for p in profiles), strict=True)))
        return Profile(
            layers,
            max(p.base for p in profiles),
            max(p.step for p in profiles),
            min(p.input_bytes for p in profiles),
            profiles[0].min_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return lists, strings and integers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """Read what `as_dict` gave."""
        layers = tuple(
            replace(Layer(**one), options=tuple(map(_option, one["options"])))
            for one in data["layers"]
        )
        return cls(**{**data, "layers": layers})


def _option(data: Mapping[str, Any]) -> LayerOption:
    return LayerOption(**{**data, "actions": tuple(map(tuple, data["actions"]))})


def _merged_layer(same: tuple[Layer, ...]) -> Layer:
    numbers = ("held", "forward", "backward", "leaving", "time", "out_time", "back_time", "host")

    def option(options: tuple[LayerOption, ...]) -> LayerOption:
        most = {name: max(getattr(o, name) for o in options) for name in numbers}
        return replace(options[0], **most)

    return replace(
        same[0],
        options=tuple(map(option, zip(*(layer.options for layer in same), strict=True))),
        forward_time=min(layer.forward_time for layer in same),
        backward_time=min(layer.backward_time for layer in same),
    )


def joined(profiles: Sequence[Profile], in_flight: Sequence[int], extra: int = 0) -> Problem:
    """Return the problem of several chunks of a pipeline that share a device.

    Sites are called "0:layers.0", "1:layers.0", by chunk.

    Args:
        profiles: of the chunks, in the order of forward, each of its own micro-batch.
        in_flight: micro-batches of each chunk between their forward and backward.
        extra: see `Profile.problem`.
    """
    layers = [
        _prefixed(replace(layer, in_flight=count), f"{number}:")
        for number, (found, count) in enumerate(zip(profiles, in_flight, strict=True))
        for layer in found.layers
    ]
    step = sum(found.step for found in profiles) + extra
    return chain(layers, step, min_bytes=max(found.min_bytes for found in profiles))


def _prefixed(layer: Layer, prefix: str) -> Layer:
    options = tuple(
        replace(one, actions=tuple((prefix + part, action) for part, action in one.actions))
        for one in layer.options
    )
    return replace(layer, name=prefix + layer.name, options=options)


def profile(
    where: nn.Module | Session,
    step: Callable[[], object],
    *,
    layers: Sequence[str] | None = None,
    actions: Sequence[str] = ACTIONS,
    steps: int = 2,
    min_bytes: int = MIN_BYTES,
    clock: Clock | None = None,
    parts: Sequence[Part] = PARTS,
) -> Profile:
    """Measure bytes and times of a step: as it is, and with each combination of actions.

    Bytes are exact: every storage that operators make, by layer and direction. What is discarded
    and computed again is measured in every combination; what swapping adds to it is composed from
    the storages that the combination saves and the time that copies take, see `device.probe`.
    Random states, buffers and gradients are left as found.

    Args:
        where: a model in no open session; or its open session, in which nothing is installed.
        step: runs one forward and returns the loss, or runs the backward as well.
        layers: names with wildcards of the layers, each called once a step, one after the other;
            None: the children of the outermost module lists.
        actions: what to try, beside keeping everything. "swap" is left out on the processor.
        steps: for the times, of which the least counts.
        min_bytes: storages below are not swapped.
        clock: returns nanoseconds; None: that of the machine, or of a simulated device.
        parts: what layers have that can be kept or had again.

    Raises:
        MemoryFeatureError: E-M22, no layers were found, or a step does not run each of them once;
            E-M20, a session acts on the model already.
    """
    model = where if isinstance(where, nn.Module) else where.model
    names = layer_names(model) if layers is None else [n for n, _ in matched(model, list(layers))]
    if not names:
        refuse("E-M22", "no module list in the model", "name the layers with layers=")
    trials = _Trials(where, step, names, parts, min_bytes, steps, clock)
    if "swap" in actions:
        trials.find_copies()
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tensor_bytes((args, kwargs))), with_kwargs=True
    )
    try:
        runs = dict(trials.all(actions))
    finally:
        handle.remove()
    keep = runs[Combination()].phases
    found = layers_of(model, names, runs, parts, trials.rates)
    base, end = keep["begin"][0].start, keep["optimizer step"][0].start
    return Profile(found, base, end, max(sizes), min_bytes)


def layer_names(model: nn.Module) -> list[str]:
    """Return the paths of the children of the outermost module lists."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    return [f"{n}.{i}" for n in outer for i in range(len(model.get_submodule(n)))]  # type: ignore[arg-type]


def tensor_bytes(tree: object) -> int:
    """Return the bytes of the tensors in a tree."""
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))


def trial(where: nn.Module | Session) -> AbstractContextManager[Session]:
    """Return a session to try something in."""
    return Session(where) if isinstance(where, nn.Module) else where.trial()


@dataclass
class _Trials:
    """The runs of a profile; `rates` None: nothing can be swapped."""

    where: nn.Module | Session
    step: Callable[[], object]
    names: Sequence[str]
    parts: Sequence[Part]
    min_bytes: int
    steps: int
    clock: Clock | None
    rates: Rates | None = None

    def find_copies(self) -> None:
        """See whether the device can copy, how fast, and whether it has a clock of its own."""
        with trial(self.where) as session:
            device = session.device
        if device.name == "cpu":
            return
        self.rates = probe(device)
        if self.clock is None and isinstance(device, Sim) and device.clock is not None:
            virtual = device.clock
            self.clock = lambda: virtual.now

    def all(self, actions: Sequence[str]) -> Iterator[tuple[Combination, Run]]:
        """Run every combination that acts on something; the first one keeps everything."""
        for combination in combinations(self.parts, actions):
            wanted = self._wanted(combination)
            if combination.again and not wanted:
                continue
            try:
                with trial(self.where) as session:
                    install(session, wanted, self.names, self.min_bytes, self.parts)
                    yield combination, self._run(session)
            except MemoryFeatureError as refused:
                if not combination.again or refused.code == "E-M20":
                    raise
                log.info("%s is no option: %s", combination.label, refused)

    def _wanted(self, combination: Combination) -> dict[str, str]:
        """Return what to install: on the layers that have all its parts."""
        model = self.where if isinstance(self.where, nn.Module) else self.where.model
        return {
            part.of(name): part.action
            for name in self.names
            if all(part.find(model, name) for part in combination.again)
            for part in combination.again
        }

    def _run(self, session: Session) -> Run:
        """Return the phases by name: the first with bytes, the others with times."""
        saved: list[tuple[str, int]] = []

        def turn() -> None:
            saved.extend(
                (entry.site.module, entry.nbytes)
                for entry in session.ledger.entries
                if not entry.fixed and entry.live_bytes and entry.nbytes >= self.min_bytes
                if entry.device == where
            )

        where = next((p.device for p in session.model.parameters()), None)
        if self.rates is not None:
            session.ledger  # noqa: B018  counts from here on
        first = self._record(session, count=True, turn=None if self.rates is None else turn)
        recorded = [first, *(self._record(session, count=False) for _ in range(self.steps))]
        _check_once([phase.name for phase in first], self.names)
        names = {phase.name for phase in first} | {"end"}
        return Run({n: tuple(_phase(run, n) for run in recorded) for n in names}, tuple(saved))

    def _record(
        self, session: Session, *, count: bool, turn: Callable[[], object] | None = None
    ) -> list[Phase]:
        return record(
            session.model,
            self.step,
            self.names,
            self.clock or time.perf_counter_ns,
            count=count,
            sources=session.sources,
            turn=turn,
        )


def _check_once(found: Sequence[str], names: Sequence[str]) -> None:
    want = [f"{way} {name}" for name in names for way in ("forward", "backward")]
    wrong = [name for name in want if found.count(name) != 1]
    if wrong:
        refuse("E-M22", f"a step does not run {wrong[:3]} once", "name other layers with layers=")


def _phase(run: Sequence[Phase], name: str) -> Phase:
    """Return a phase; "end" is empty where the layers' input has no gradient."""
    return next((phase for phase in run if phase.name == name), Phase(name, 0, 0, 0))
