"""One patched place: resolved, composed from its records, installed, and put back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence, Set
from types import FunctionType, ModuleType
from typing import Any

from mindspeed.patching import references
from mindspeed.patching.calls import Tally, can_count, counted
from mindspeed.patching.errors import PatchError
from mindspeed.patching.plan import Step
from mindspeed.patching.references import Variable, Variables

_MISSING = object()

Place = tuple[Any, str]


def load(reference: str) -> Any:
    """The object behind `"pkg.module:attr.path"`.

    Raises:
        PatchError: there is no such module or attribute.
    """
    module_name, _, path = reference.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"cannot load {reference}: {error}") from error
    return value


class Slot:
    """One target with all patches that concern it.

    Composition starts from the untouched original every time, so that adding a patch never wraps
    what is wrapped already.
    """

    def __init__(self, target: str, steps: Sequence[Step]) -> None:
        self.target = target
        self.steps = tuple(steps)
        self.module_name, _, self._path = target.partition(":")
        self.root = self.module_name.partition(".")[0]
        self.status = "waiting"
        self.stale: list[str] = []
        self.tally: Tally | None = None
        self._owner: Any = None
        self._base: Any = _MISSING
        self._installed: Any = _MISSING
        self.copies: list[Variable] = []

    @property
    def name(self) -> str:
        """Last part of the attribute path."""
        return self._path.rpartition(".")[2]

    def prepare(self, module: ModuleType) -> None:
        """Find the place and compose what goes there; nothing is changed yet.

        Raises:
            PatchError: the target is not there, or a value does not fit.
        """
        needed = [step for step in self.steps if self._is_needed(step, module)]
        if not needed:
            self.status = "not needed"
            return
        self._owner = self._find_owner(module)
        self._base = vars(self._owner).get(self.name, _MISSING)
        self._check_existence(needed)
        self.tally = None
        self._installed = self._compose(needed)
        self.status = "prepared"

    @property
    def original(self) -> Any:
        """The function or object that the place held before."""
        return _content(self._base)

    @property
    def has_original(self) -> bool:
        """Whether there was one that is at home here, so that whoever holds it holds ours."""
        prepared = self.status == "prepared" and self._base is not _MISSING
        return prepared and self._defines(self.original)

    @property
    def rebound(self) -> tuple[str, ...]:
        """Module variables that held the original by value."""
        return tuple(f"{module.__name__}:{key}" for module, key in self.copies)

    @property
    def place(self) -> Place:
        """Owner and name of the patched place."""
        return self._owner, self.name

    def commit(self, variables: Variables, others: Set[Place] = frozenset()) -> None:
        """Put the composed object in place, and in place of every by-value copy.

        Args:
            variables: where copies are looked for, one for all slots that are changed together.
            others: places and copies of other slots, which look after themselves.
        """
        if self.status == "prepared":
            _assign(self._owner, self.name, self._installed)
            taken = others | {self.place}
            self.copies = self._rebind(self._base, self._installed, taken, variables)
            self.status = "applied"

    def restore(self, variables: Variables, others: Set[Place] = frozenset()) -> None:
        """Put the original back.

        Args:
            variables: where copies are looked for, one for all slots that are changed together.
            others: places and copies of other slots, which look after themselves.

        Raises:
            PatchError: somebody else has changed the place since; it is left alone.
        """
        if self.status != "applied":
            self.status = "waiting"
            return
        current = vars(self._owner).get(self.name, _MISSING)
        self._rebind(self._installed, self._base, others | {self.place}, variables)
        self.status = "waiting"
        if current is not self._installed:
            raise PatchError(
                f"{self.target} was changed by somebody else while it was patched; it now holds"
                f" {current!r} and was left alone"
            )
        _assign(self._owner, self.name, self._base)
        self._base = self._installed = _MISSING
        self.copies = []

    def _is_needed(self, step: Step, module: ModuleType) -> bool:
        return step.patch.probe is None or bool(load(step.patch.probe)(module))

    def _find_owner(self, module: ModuleType) -> Any:
        owner: Any = module
        for part in self._path.split(".")[:-1]:
            inner = vars(owner).get(part, _MISSING)
            if not isinstance(inner, type):
                raise PatchError(f"{self.target}: {part!r} is not a class of {owner!r}")
            owner = inner
        return owner

    def _check_existence(self, steps: Sequence[Step]) -> None:
        adds = steps[0].patch.kind == "add"
        if adds and self._base is not _MISSING:
            raise PatchError(f"{self.target} exists already; kind 'add' creates new names only")
        if not adds and self._base is _MISSING:
            raise PatchError(f"{self.target} does not exist; only kind 'add' may create a name")

    def _compose(self, steps: Sequence[Step]) -> Any:
        value = _content(self._base)
        for step in steps:
            loaded = load(step.patch.value)
            value = self._wrapped(step, loaded, value) if step.patch.kind == "wrap" else loaded
        if steps[-1].patch.kind in ("set", "add"):
            return value
        if can_count(value):
            self.tally = Tally()
            value = counted(value, _content(self._base), self.tally)
        return _like(self._base, value)

    def _wrapped(self, step: Step, wrap: Callable[[Any], Any], value: Any) -> Any:
        if not callable(value):
            raise PatchError(f"{self.target} is {value!r}, which cannot be wrapped")
        wrapped = wrap(value)
        if not isinstance(wrapped, FunctionType):
            raise PatchError(
                f"{step.patch.value} must return a plain function for {self.target}, got"
                f" {wrapped!r}"
            )
        return wrapped

    def _rebind(
        self, old: Any, new: Any, others: Set[Place], variables: Variables
    ) -> list[Variable]:
        old, new = _content(old), _content(new)
        if old is _MISSING or new is _MISSING or not references.can_follow(old):
            return []
        # Elsewhere, the value of a variable may be at home: only namesakes are copies of it.
        anywhere = self._defines(old)
        places = []
        for place in variables.holding(self.root, old):
            known = anywhere or place[1] == self.name or place in self.copies
            if known and place not in others:
                variables.assign(self.root, place, new)
                places.append(place)
        return places

    def _defines(self, value: Any) -> bool:
        """Whether the target is the place where a function or class was defined."""
        home = (getattr(value, "__module__", None), getattr(value, "__qualname__", None))
        return home == (self.module_name, self._path)


def find_stale(slots: Sequence[Slot], fresh: str | None) -> None:
    """Record, for each prepared slot, who holds its original where rebinding cannot reach.

    Args:
        slots: prepared, not committed.
        fresh: name of their module if it was imported just now, so that nobody else can hold a
            thing of it; `None` looks everywhere.
    """
    found: references.Findings = {}
    for root in {slot.root for slot in slots if slot.has_original}:
        members = [slot for slot in slots if slot.has_original and slot.root == root]
        wanted = [references.Wanted(s.target, s.original, s.place) for s in members]
        modules = references.modules_under(root)
        if fresh is None:
            found.update(references.holders_outside(root, wanted))
        else:
            modules = [(name, module) for name, module in modules if name == fresh]
        for target, places in references.unreachable(modules, wanted).items():
            found.setdefault(target, []).extend(places)
    for slot in slots:
        slot.stale = found.get(slot.target, [])


def _assign(owner: Any, name: str, raw: Any) -> None:
    if isinstance(owner, ModuleType):
        if raw is _MISSING:
            del vars(owner)[name]
        else:
            vars(owner)[name] = raw
    elif raw is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, raw)


def _content(raw: Any) -> Any:
    """The function inside a descriptor, or the object itself."""
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__
    return raw.fget if isinstance(raw, property) else raw


def _like(raw: Any, value: Any) -> Any:
    """`value` as the same kind of class attribute that `raw` is."""
    if isinstance(value, (staticmethod, classmethod, property)):
        return value
    if isinstance(raw, (staticmethod, classmethod)):
        return type(raw)(value)
    if isinstance(raw, property):
        return property(value, raw.fset, raw.fdel, raw.__doc__)
    return value
