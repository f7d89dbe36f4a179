"""Measure what every way to treat a layer costs: each is tried on all layers at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import recompute
from ..errors import MemoryFeatureError, refuse
from ..recompute.match import layer_index, matched
from ..session import Session
from .measure import Clock, Phase, record
from .problem import Layer, LayerOption, Problem, chain

Install = Callable[[Session, Sequence[str]], object]


def _recompute(session: Session, layers: Sequence[str]) -> object:
    return recompute.modules(session, list(layers))


def _discard(session: Session, layers: Sequence[str]) -> object:
    places = {layer_index(session.model, f"{name}.") for name in layers}
    return recompute.norms(session, layers=lambda index: index in places)


# Action -> what installs it on some layers.
TREATMENTS: dict[str, Install] = {"discard": _discard, "recompute": _recompute}


@dataclass(frozen=True)
class Profile:
    """What was measured, for `solve`.

    Attributes:
        layers: with their options, the outermost first: what comes before the layers ("begin"),
            the layers, and what comes after them ("between": head and loss).
        base: bytes alive when a step begins: parameters and buffers.
        step: bytes alive when it has ended: gradients as well.
        input_bytes: of the tensors that the model was given; a plan holds for inputs up to this.
    """

    layers: tuple[Layer, ...]
    base: int
    step: int
    input_bytes: int

    def problem(self, *, in_flight: int = 1, extra: int = 0) -> Problem:
        """Return what `solve` takes.

        Args:
            in_flight: micro-batches between their forward and backward.
            extra: bytes alive all the time that the step does not show: optimizer state,
                communication buffers.
        """
        layers = [replace(layer, in_flight=in_flight) for layer in self.layers]
        return chain(layers, self.base + extra, step=self.step + extra)

    def scaled(self, compute: float) -> Profile:
        """Return the profile of a device that needs `compute` times as long to compute."""

        def slower(option: LayerOption) -> LayerOption:
            return replace(option, time=round(option.time * compute))

        layers = (replace(one, options=tuple(map(slower, one.options))) for one in self.layers)
        return replace(self, layers=tuple(layers))

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
        return cls(layers, data["base"], data["step"], data["input_bytes"])


def _option(data: Mapping[str, Any]) -> LayerOption:
    return LayerOption(**{**data, "actions": tuple(map(tuple, data["actions"]))})


def profile(
    model: nn.Module,
    step: Callable[[], object],
    *,
    layers: Sequence[str] | None = None,
    actions: Sequence[str] = tuple(TREATMENTS),
    steps: int = 2,
    clock: Clock = time.perf_counter_ns,
    session: Callable[[nn.Module], Session] = Session,
) -> Profile:
    """Measure bytes and times of a step: once as it is, and once with each action on all layers.

    Bytes are exact: every storage that operators make, by layer and direction. Random states,
    buffers and gradients are left as found.

    Args:
        model: in no open session.
        step: runs the forward and returns the loss, or runs the backward as well.
        layers: names with wildcards of the layers, each called once a step, one after the other;
            None: the children of the outermost module lists.
        actions: what to try, beside keeping everything.
        steps: for the times, of which the least counts.
        clock: returns nanoseconds.
        session: opens the session in which an action is tried; a framework's own registers its
            generators.

    Raises:
        MemoryFeatureError: E-M22, no layers were found, or a step does not run each of them once.
    """
    names = layer_names(model) if layers is None else [n for n, _ in matched(model, list(layers))]
    if not names:
        refuse("E-M22", "no module list in the model", "name the layers with layers=")
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tensor_bytes((args, kwargs))), with_kwargs=True
    )
    try:
        runs = {"keep": _runs(model, step, names, None, steps, clock)}
        for action in actions:
            found = _try(session, model, step, names, action, steps, clock)
            if found is not None:
                runs[action] = found
    finally:
        handle.remove()
    return Profile(_layers(names, runs), *_statics(runs["keep"]), max(sizes))


def layer_names(model: nn.Module) -> list[str]:
    """Return the paths of the children of the outermost module lists."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    return [f"{n}.{i}" for n in outer for i in range(len(model.get_submodule(n)))]  # type: ignore[arg-type]


def tensor_bytes(tree: object) -> int:
    """Return the bytes of the tensors in a tree."""
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))


Runs = dict[str, tuple[Phase, ...]]


def _try(
    open_session: Callable[[nn.Module], Session],
    model: nn.Module,
    step: Callable[[], object],
    names: Sequence[str],
    action: str,
    steps: int,
    clock: Clock,
) -> Runs | None:
    """Measure an action; None: it has nothing to act on in this model."""
    try:
        with open_session(model) as session:
            TREATMENTS[action](session, names)
            return _runs(model, step, names, session, steps, clock)
    except MemoryFeatureError as refused:
        if refused.code != "E-M22":
            raise
        return None


def _runs(
    model: nn.Module,
    step: Callable[[], object],
    names: Sequence[str],
    session: Session | None,
    steps: int,
    clock: Clock,
) -> Runs:
    """Return the phases by name: the first with bytes, the others with times."""
    recorded = [record(model, step, names, clock, count=True)]
    recorded += [record(model, step, names, clock, count=False) for _ in range(steps)]
    found = [phase.name for phase in recorded[0]]
    want = [f"{way} {name}" for name in names for way in ("forward", "backward")]
    wrong = [name for name in want if found.count(name) != 1]
    if wrong:
        refuse("E-M22", f"a step does not run {wrong[:3]} once", "name other layers with layers=")
    return {name: tuple(_phase(run, name) for run in recorded) for name in {*found, "end"}}


def _phase(run: Sequence[Phase], name: str) -> Phase:
    """Return a phase; "end" is empty where the layers' input has no gradient."""
    return next((phase for phase in run if phase.name == name), Phase(name, 0, 0, 0))


def _statics(keep: Runs) -> tuple[int, int]:
    return keep["begin"][0].start, keep["optimizer step"][0].start


def _layers(names: Sequence[str], runs: Mapping[str, Runs]) -> tuple[Layer, ...]:
    """Return what comes before the layers, the layers, and what comes after them."""
    keep = {name: phases[0] for name, phases in runs["keep"].items()}
    begin, end, turn = keep["begin"], keep["end"], keep[f"after {names[-1]}"]
    before = LayerOption(
        "keep",
        held=keep[f"forward {names[0]}"].start - begin.start,
        forward=begin.peak - begin.start,
        backward=max(0, end.peak - begin.start),
    )
    most = turn.peak - turn.start
    after = LayerOption("keep", held=0, forward=most, backward=most)
    middle = (
        Layer(name, tuple(_measured(name, follower, a, runs) for a in runs))
        for name, follower in zip(names, (*names[1:], None), strict=True)
    )
    layers = _levelled(list(middle))
    return Layer("before the layers", (before,)), *layers, Layer("after the layers", (after,))


def _levelled(layers: Sequence[Layer]) -> list[Layer]:
    """Give options that hold the same bytes one time, the median: the rest is noise."""
    times: dict[tuple[str, int, int], list[int]] = {}
    for layer in layers:
        for option in layer.options:
            times.setdefault((option.name, option.held, option.forward), []).append(option.time)

    def level(option: LayerOption) -> LayerOption:
        alike = times[option.name, option.held, option.forward]
        return replace(option, time=statistics.median_low(alike))

    return [replace(layer, options=tuple(map(level, layer.options))) for layer in layers]


def _measured(
    name: str, follower: str | None, action: str, runs: Mapping[str, Runs]
) -> LayerOption:
    run, keep = runs[action], runs["keep"]
    forward, backward = run[f"forward {name}"], run[f"backward {name}"]
    after = run[f"after {name}"][0]
    start = forward[0].start
    held = after.start if follower is None else run[f"forward {follower}"][0].start
    peak = forward[0].peak if follower is None else max(forward[0].peak, after.peak)
    added = _least(forward, backward) - _least(keep[f"forward {name}"], keep[f"backward {name}"])
    kept = action == "keep"
    return LayerOption(
        action,
        held=held - start,
        forward=peak - start,
        backward=backward[0].peak - start,
        time=0 if kept else max(0, added),
        actions=() if kept else ((name, action),),
    )


def _least(*phases: Sequence[Phase]) -> int:
    """Return the least time of the runs that only took time."""
    return sum(min(phase.time for phase in one[1:] or one) for one in phases)
