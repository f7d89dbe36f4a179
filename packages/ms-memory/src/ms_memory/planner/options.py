"""From what was measured to the options of layers: bytes of each phase, times, copies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..device.probe import Rates
from ..swap.pool import size_class
from ..swap.windows import within
from .measure import Phase
from .parts import Combination, Part, swaps
from .problem import Layer, LayerOption

BEFORE, AFTER = "before the layers", "after the layers"


@dataclass(frozen=True)
class Run:
    """A combination on all layers that have its parts.

    Attributes:
        phases: by name; the first entry has bytes, the others times.
        saved: path of the module and bytes of every storage that may wait on the host.
    """

    phases: Mapping[str, tuple[Phase, ...]]
    saved: tuple[tuple[str, int], ...] = ()


def layers_of(
    model: nn.Module,
    names: Sequence[str],
    runs: Mapping[Combination, Run],
    parts: Sequence[Part],
    rates: Rates | None,
) -> tuple[Layer, ...]:
    """Return what comes before the layers, the layers, and what comes after them.

    Args:
        model: whose layers.
        names: of the layers, in the order of forward.
        runs: what was measured.
        parts: what layers have.
        rates: of copies; None: nothing is swapped.
    """
    keep = runs[Combination()].phases
    followers = (*names[1:], None)
    measured = [
        Layer(
            name,
            tuple(
                _measured(name, follower, one, run, keep)
                for one, run in runs.items()
                if all(part.find(model, name) for part in one.again)
            ),
            forward_time=_least(keep[f"forward {name}"], keep[f"after {name}"]),
            backward_time=_least(keep[f"backward {name}"]),
        )
        for name, follower in zip(names, followers, strict=True)
    ]
    layers = _levelled(measured)
    if rates is not None:
        layers = [_with_swaps(model, one, names[-1], runs, parts, rates) for one in layers]
    return (_before(keep, names[0]), *layers, _after(keep, names[-1]))


def _before(keep: Mapping[str, tuple[Phase, ...]], first: str) -> Layer:
    begin, end = keep["begin"][0], keep["end"][0]
    option = LayerOption(
        "keep",
        held=keep[f"forward {first}"][0].start - begin.start,
        forward=begin.peak - begin.start,
        backward=max(0, end.peak - begin.start),
    )
    return Layer(BEFORE, (option,))


def _after(keep: Mapping[str, tuple[Phase, ...]], last: str) -> Layer:
    turn = keep[f"after {last}"][0]
    most = turn.peak - turn.start
    return Layer(AFTER, (LayerOption("keep", held=0, forward=most, backward=most),))


def _measured(
    name: str,
    follower: str | None,
    combination: Combination,
    run: Run,
    keep: Mapping[str, tuple[Phase, ...]],
) -> LayerOption:
    phases = run.phases
    forward, backward = phases[f"forward {name}"], phases[f"backward {name}"]
    after = phases[f"after {name}"][0]
    start = forward[0].start
    held = after.start if follower is None else phases[f"forward {follower}"][0].start
    peak = forward[0].peak if follower is None else max(forward[0].peak, after.peak)
    added = _least(forward, backward) - _least(keep[f"forward {name}"], keep[f"backward {name}"])
    return LayerOption(
        combination.label,
        held=held - start,
        forward=peak - start,
        backward=backward[0].peak - start,
        time=max(0, added) if combination.again else 0,
        actions=combination.actions(name),
    )


def _least(*phases: Sequence[Phase]) -> int:
    """Return the least time of the runs that only took time."""
    return sum(min(phase.time for phase in one[1:] or one) for one in phases)


def _levelled(layers: Sequence[Layer]) -> list[Layer]:
    """Give layers and options that hold the same bytes one time, the median: the rest is noise."""
    times: dict[object, list[int]] = {}
    windows: dict[object, list[tuple[int, int]]] = {}
    for layer in layers:
        windows.setdefault(_kind(layer.options[0]), []).append(
            (layer.forward_time, layer.backward_time)
        )
        for option in layer.options:
            times.setdefault(_kind(option), []).append(option.time)

    def level(option: LayerOption) -> LayerOption:
        return replace(option, time=statistics.median_low(times[_kind(option)]))

    def level_all(layer: Layer) -> Layer:
        forward, backward = zip(*windows[_kind(layer.options[0])], strict=True)
        return replace(
            layer,
            options=tuple(map(level, layer.options)),
            forward_time=statistics.median_low(forward),
            backward_time=statistics.median_low(backward),
        )

    return [level_all(layer) for layer in layers]


def _kind(option: LayerOption) -> object:
    return option.name, option.held, option.forward


def _with_swaps(
    model: nn.Module,
    layer: Layer,
    last: str,
    runs: Mapping[Combination, Run],
    parts: Sequence[Part],
    rates: Rates,
) -> Layer:
    """Add to every option of a layer those in which what it saves waits on the host."""
    by_label = {combination.label: (combination, run) for combination, run in runs.items()}
    made = []
    for option in layer.options:
        combination, run = by_label[option.name]
        inside = [(module, n) for module, n in run.saved if within(module, layer.name)]
        for one in swaps(combination, parts):
            paths = [path for part in one.swapped for path in part.find(model, layer.name)]
            sizes = [n for module, n in inside if any(within(module, path) for path in paths)]
            if sizes:
                made.append(_swapped(option, one, layer.name, sizes, layer.name == last, rates))
    return replace(layer, options=(*layer.options, *made))


def _swapped(
    option: LayerOption,
    combination: Combination,
    layer: str,
    sizes: Sequence[int],
    last: bool,
    rates: Rates,
) -> LayerOption:
    """Return an option some of whose storages leave: their bytes change place, no others do."""
    out = sum(sizes)
    return replace(
        option,
        name=combination.label,
        # A layer's input belongs to what the layer before holds, and may be what leaves.
        held=max(0, option.held - out),
        leaving=0 if last else out,  # the last layer's copies are waited for at once
        out_time=rates.out.time(sizes),
        back_time=rates.back.time(sizes),
        host=sum(map(size_class, sizes)),
        actions=combination.actions(layer),
    )
