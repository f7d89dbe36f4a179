"""What can be done to a layer: to its norms, activation, attention, MLP, or all of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .. import recompute
from ..errors import refuse
from ..recompute.activation import activations_of
from ..recompute.norms import norms_of
from ..session import Session
from ..swap.windows import windows

ATTENTION = ("self_attention", "self_attn", "attention", "attn")
INPUT = "input"
MLP = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True)
class Part:
    """Something of a layer that is kept, or had again.

    Attributes:
        name: "norms", ...; "" is the layer itself.
        action: "discard" or "recompute".
        find: model and path of a layer -> paths of the modules; empty: the layer has none.
        install: acts on such paths of several layers, until the session is closed.
        inside: names of parts that it drops anyway.
        swap: what it saves may also wait on the host.
    """

    name: str
    action: str
    find: Callable[[nn.Module, str], Sequence[str]]
    install: Callable[[Session, Sequence[str]], object]
    inside: frozenset[str] = frozenset()
    swap: bool = False

    def of(self, layer: str) -> str:
        """Return what the part of a layer is called in plans and pins."""
        return f"{layer}.{self.name}" if self.name else layer

    def input_of(self, layer: str) -> str:
        """Return what the inputs of the part are called."""
        return f"{self.of(layer)}.{INPUT}"

    @property
    def label(self) -> str:
        """Return what is done, for people."""
        return self.name if self.action == "discard" else f"{self.action} {self.name}".strip()


def _child(names: Sequence[str]) -> Callable[[nn.Module, str], Sequence[str]]:
    """Return what finds a layer's child of one of these names, if it has weights."""

    def find(model: nn.Module, layer: str) -> Sequence[str]:
        children = dict(model.get_submodule(layer).named_children())
        found = [n for n in names if n in children and any(True for _ in children[n].parameters())]
        return [f"{layer}.{n}" for n in found[:1]]

    return find


def _modules(session: Session, paths: Sequence[str]) -> object:
    wanted = frozenset(paths)
    return recompute.modules(session, lambda name, _: name in wanted)


def _norms(session: Session, paths: Sequence[str]) -> object:
    wanted = frozenset(paths)
    return recompute.norms(session, lambda name, _: name in wanted)


def _activation(session: Session, paths: Sequence[str]) -> object:
    wanted = frozenset(paths)
    return recompute.activation(session, lambda name, _: name in wanted)


PARTS = (
    Part("norms", "discard", norms_of, _norms),
    Part("activation", "discard", activations_of, _activation),
    Part("attention", "recompute", _child(ATTENTION), _modules, swap=True),
    Part("mlp", "recompute", _child(MLP), _modules, inside=frozenset({"activation"}), swap=True),
    Part(
        "",
        "recompute",
        lambda _, layer: [layer],
        _modules,
        inside=frozenset({"norms", "activation", "attention", "mlp"}),
        swap=True,
    ),
)


@dataclass(frozen=True)
class Combination:
    """Parts of a layer that are discarded or computed again, and those that wait on the host."""

    again: tuple[Part, ...] = ()
    swapped: tuple[Part, ...] = ()

    @property
    def label(self) -> str:
        """Return its name, for people and pins."""
        labels = [part.label for part in self.again]
        labels += [f"swap {self._left(part)}".strip() for part in self.swapped]
        return " + ".join(labels) or "keep"

    def _left(self, part: Part) -> str:
        """Return what there is to swap: the inputs of what is computed again."""
        return f"{part.name} {INPUT}".strip() if part in self.again else part.name

    def actions(self, layer: str) -> tuple[tuple[str, str], ...]:
        """Return what a plan says of a layer: (part, action)."""
        done = [(part.of(layer), part.action) for part in self.again]
        for part in self.swapped:
            done.append((part.input_of(layer) if part in self.again else part.of(layer), "swap"))
        return tuple(done)


def combinations(parts: Sequence[Part], actions: Collection[str]) -> list[Combination]:
    """Return all sets of parts of which none lies in another; the empty one first."""
    usable = [part for part in parts if part.action in actions]
    found = []
    for size in range(len(usable) + 1):
        for chosen in itertools.combinations(usable, size):
            names = {part.name for part in chosen}
            if not any(names & part.inside for part in chosen):
                found.append(Combination(chosen))
    return found


def swaps(again: Combination, parts: Sequence[Part]) -> list[Combination]:
    """Return what may wait on the host beside what is done again.

    One part, all parts without what lies between them, or all of the layer. What is computed again
    has only its inputs to give, which is worth it for a whole layer.
    """
    taken = {part.name for part in again.again}
    hidden = taken | {name for part in again.again for name in part.inside}
    some = [part for part in parts if part.swap and part.name and part.name not in hidden]
    sets = [(part,) for part in some] + [tuple(some)] * (len(some) > 1)
    sets += [(part,) for part in parts if part.swap and not part.name]
    return [Combination(again.again, chosen) for chosen in sets]


def install(
    session: Session,
    actions: Mapping[str, str],
    layers: Sequence[str],
    min_bytes: int,
    parts: Sequence[Part] = PARTS,
) -> None:
    """Do what a plan says until the session is closed.

    Args:
        session: whose model.
        actions: part of a layer -> action.
        layers: paths of all layers, in the order of forward.
        min_bytes: storages below are not swapped.
        parts: what the names mean.

    Raises:
        MemoryFeatureError: E-M22, a layer has no such part; what the actions themselves raise.
        ValueError: a name or an action that no part has.
    """
    pairs = [(part, layer) for layer in layers for part in parts]
    named = {part.of(layer): (part, layer, part.action) for part, layer in pairs}
    inputs = {part.input_of(layer): (part, layer, "swap") for part, layer in pairs}
    swapped: list[str] = []
    paths: dict[str, list[str]] = {part.name: [] for part in parts}
    for name, action in actions.items():
        part, layer, does = named.get(name) or inputs.get(name) or (None, "", "")
        if part is None or not (action == does or (action == "swap" and part.swap)):
            raise ValueError(f"apply: plan: got {action!r} of {name!r}, need {_known(parts)}")
        found = part.find(session.model, layer)
        if not found:
            refuse("E-M22", f"{name!r}", f"layer {layer!r} has no {part.name}, plan this model")
        if action == "swap":
            swapped += found
        else:
            paths[part.name] += found
    for part in parts:
        if paths[part.name]:
            part.install(session, paths[part.name])
    if swapped:
        windows(session, swapped, layers, min_bytes)


def _known(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.action!r} of a layer's {part.name or 'all'}" for part in parts)
