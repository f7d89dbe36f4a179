"""Carrying out a plan, and taking it back exactly."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType, TracebackType

from mindspeed.patching.drift import late_problem
from mindspeed.patching.errors import PatchError, StalePlanError
from mindspeed.patching.first_step import watch_first_step
from mindspeed.patching.hooks import ImportHooks
from mindspeed.patching.plan import Plan, Step, plan
from mindspeed.patching.references import Variables
from mindspeed.patching.slot import Place, Slot, find_stale, load
from mindspeed.patching.source import installed_source, installed_version
from mindspeed.patching.stubs import StubFinder


@dataclass(frozen=True)
class Row:
    """What became of one target.

    Attributes:
        target: `module:attr.path`, or a stubbed module's name.
        kinds: of its patches, innermost first.
        features: that brought them.
        status: `applied`; `waiting` for its module to be imported; `not needed` by its probe.
        calls: eager calls since it was applied; `None` where calls are not counted.
        rebound: module variables that held the original by value and now hold the patched object.
        stale: places that still hold the original and cannot be reached.
    """

    target: str
    kinds: tuple[str, ...]
    features: tuple[str, ...]
    status: str
    calls: int | None
    rebound: tuple[str, ...]
    stale: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a handle did, one row a target."""

    plan: str
    rows: tuple[Row, ...]

    @property
    def stale(self) -> tuple[str, ...]:
        """Every unreachable reference to an original."""
        return tuple(f"{place} still holds {r.target}" for r in self.rows for place in r.stale)

    def __str__(self) -> str:
        lines = [f"plan {self.plan}"]
        for row in self.rows:
            calls = "" if row.calls is None else f", {row.calls} calls"
            copies = f", {len(row.rebound)} copies rebound" if row.rebound else ""
            lines.append(f"  {row.status:10} {row.target} [{'+'.join(row.kinds)}]{calls}{copies}")
        lines.extend(f"  stale: {text}" for text in self.stale)
        return "\n".join(lines)


class Handle:
    """A plan that is in force. Use it as a context manager, or call `undo`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._slots: dict[str, Slot] = {}
        self._stubbed: list[str] = []
        self._stubs = StubFinder()
        self._hooks = ImportHooks()
        self._waiting: dict[str, list[Slot]] = {}
        self._holds = 0
        self._on_undo: list[Callable[[], object]] = []
        self._stop_watching: Callable[[], None] | None = None
        self._last: tuple[Report, tuple[str, ...]] | None = None

    @property
    def active(self) -> bool:
        """Whether the plan is in force."""
        return _state.active is self

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._holds -= 1
        if self._holds <= 0:
            self.undo()

    def on_undo(self, callback: Callable[[], object]) -> None:
        """Have something else taken back with the plan, before it; the same callback once."""
        if callback not in self._on_undo:
            self._on_undo.append(callback)

    def undo(self) -> None:
        """Take everything back, last change first; a second call does nothing.

        Raises:
            PatchError: somebody else changed a patched place meanwhile. Every other place has been
                restored; the message names the ones that were left alone.
        """
        with _state.lock:
            if not self.active:
                return
            self._last = self.report(), self.never_called()
            _state.active = None
            problems = [*self._call_back(), *self._take_back()]
        if problems:
            raise PatchError("\n".join(problems))

    def extend(self, plan: Plan) -> None:
        """Go over to a plan that holds every step of this one and more.

        Raises:
            StalePlanError: the new plan lacks a step that is in force.
            PatchError: a new step cannot be applied; the old plan is in force unchanged.
        """
        with _state.lock:
            _check_installed(plan)
            lost = {_key(s) for s in self.plan.acting} - {_key(s) for s in plan.acting}
            if not self.active:
                raise StalePlanError(f"plan {self.plan.digest} was undone; apply a plan instead")
            if lost:
                targets = ", ".join(sorted(target for target, *_ in lost))
                raise StalePlanError(
                    f"plan {self.plan.digest} is in force and plan {plan.digest} does not contain"
                    f" it ({targets}); undo the first one before applying the second"
                )
            before = {target: slot.steps for target, slot in self._slots.items()}
            stubbed = len(self._stubbed)
            try:
                self._carry_out(plan.acting)
            except BaseException:
                self._go_back_to(before, stubbed)
                raise
            self.plan = plan

    def report(self) -> Report:
        """What became of each target so far; after `undo`, what had become of it."""
        if self._last is not None:
            return self._last[0]
        rows = [_row(slot) for slot in self._slots.values()]
        for step in self.plan.acting:
            if step.patch.kind == "stub_module":
                stubbed = step.patch.target in self._stubbed
                status = "applied" if stubbed else "not needed"
                rows.append(
                    Row(step.patch.target, ("stub_module",), (step.feature,), status, None, (), ())
                )
        return Report(self.plan.digest, tuple(sorted(rows, key=lambda row: row.target)))

    def calls(self) -> dict[str, int]:
        """Eager calls of every counted target."""
        return {r.target: r.calls for r in self.report().rows if r.calls is not None}

    def watch_first_step(self) -> None:
        """Log, after the next optimizer step, the patched functions that nobody has called."""
        if self._stop_watching is None and "torch" in sys.modules:
            self._stop_watching = watch_first_step(self)

    def never_called(self) -> tuple[str, ...]:
        """Applied targets that nobody has called; ask after the first training step."""
        if self._last is not None:
            return self._last[1]
        return tuple(
            slot.target
            for slot in self._slots.values()
            if slot.status == "applied" and slot.tally is not None and not slot.tally.called
        )

    def _carry_out(self, steps: Iterable[Step]) -> None:
        ready = []
        for target, group in groupby(steps, key=lambda step: step.patch.target):
            members = tuple(group)
            if members[0].patch.kind == "stub_module":
                self._stub(members[0])
            else:
                ready.extend(self._place(target, members))
        for slot in ready:
            slot.prepare(sys.modules[slot.module_name])
        find_stale(ready, fresh=None)
        variables = Variables()
        for slot in ready:
            slot.commit(variables, self._claimed(slot))

    def _stub(self, step: Step) -> None:
        wanted = step.patch.probe is None or load(step.patch.probe)(None)
        if wanted and step.patch.target not in self._stubbed:
            self._stubs.add(step.patch.target, load(step.patch.value))
            self._stubbed.append(step.patch.target)

    def _place(self, target: str, steps: tuple[Step, ...]) -> list[Slot]:
        """The slot of a target if it can be patched now, else nothing: it waits, or is done."""
        slot = self._slots.get(target)
        if slot is not None and [_key(s) for s in slot.steps] == [_key(s) for s in steps]:
            return []
        if slot is None:
            slot = self._slots[target] = Slot(target, steps)
        else:
            slot.restore(Variables(), self._claimed(slot))
            slot.steps = steps
        if slot.module_name in sys.modules:
            return [slot]
        self._wait(slot)
        return []

    def _wait(self, slot: Slot) -> None:
        waiting = self._waiting.setdefault(slot.module_name, [])
        if slot not in waiting:
            waiting.append(slot)
        if len(waiting) == 1:
            self._hooks.add(slot.module_name, self._imported)

    def _imported(self, module: ModuleType) -> None:
        slots = self._waiting.get(module.__name__, [])
        try:
            for slot in slots:
                self._check_late(slot)
                slot.prepare(module)
            find_stale(slots, fresh=module.__name__)
            variables = Variables()
            for slot in slots:
                slot.commit(variables, self._claimed(slot))
        except BaseException:
            variables = Variables()
            for slot in slots:
                slot.restore(variables, self._claimed(slot))
            raise
        self._waiting.pop(module.__name__, None)

    def _check_late(self, slot: Slot) -> None:
        for step in slot.steps:
            if step.status == "absent" and (
                problem := late_problem(step.patch, self.plan.megatron)
            ):
                raise PatchError(f"{step.feature}: {problem}")

    def _go_back_to(self, before: dict[str, tuple[Step, ...]], stubbed: int) -> None:
        """Undo a failed extension; slots that it did not touch stay as they are."""
        for target, slot in list(self._slots.items()):
            steps = before.get(target)
            if slot.steps == steps and slot.status != "prepared":
                continue
            slot.restore(Variables(), self._claimed(slot))
            if steps is None:
                self._forget(slot)
            elif slot.steps != steps:
                slot.steps = steps
                if slot.module_name in sys.modules:
                    slot.prepare(sys.modules[slot.module_name])
                    slot.commit(Variables(), self._claimed(slot))
        for name in reversed(self._stubbed[stubbed:]):
            self._stubs.remove(name)
        del self._stubbed[stubbed:]

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.target]
        waiting = self._waiting.get(slot.module_name, [])
        if slot in waiting:
            waiting.remove(slot)
            if not waiting:
                del self._waiting[slot.module_name]
                self._hooks.discard(slot.module_name, self._imported)

    def _claimed(self, slot: Slot) -> frozenset[Place]:
        """Places that belong to other slots, and the copies that these have rebound."""
        others = [other for other in self._slots.values() if other is not slot]
        return frozenset(place for other in others for place in (other.place, *other.copies))

    def _call_back(self) -> list[str]:
        problems = []
        while self._on_undo:
            try:
                self._on_undo.pop()()
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _take_back(self) -> list[str]:
        if self._stop_watching is not None:
            self._stop_watching()
        for name in list(self._waiting):
            self._hooks.discard(name, self._imported)
        self._waiting.clear()
        problems = []
        variables = Variables()
        for slot in reversed(self._slots.values()):
            try:
                slot.restore(variables, self._claimed(slot))
            except PatchError as error:
                problems.append(str(error))
        for name in reversed(self._stubbed):
            self._stubs.remove(name)
        self._stubbed.clear()
        self._slots.clear()
        return problems


class _State:
    """The one plan that is in force in this process."""

    def __init__(self) -> None:
        self.active: Handle | None = None
        self.lock = threading.RLock()


_state = _State()


def active_handle() -> Handle | None:
    """The handle that is in force, or `None`."""
    return _state.active


def apply(plan: Plan, *, strict: bool = False) -> Handle:
    """Carry out a plan. The same plan again is a no-op that returns the same handle.

    Targets whose modules are not imported yet are patched right after their import.

    Args:
        plan: from `plan`.
        strict: refuse when an original is still held somewhere it cannot be replaced.

    Returns:
        A handle: context manager, `undo`, `report`, `never_called`.

    Raises:
        StalePlanError: another plan is in force, or the plan is for another Megatron.
        PatchError: a target is missing or a value does not fit; nothing stays changed.
    """
    with _state.lock:
        if plan.problems:
            raise PatchError("this plan has problems: " + "; ".join(plan.problems))
        current = _state.active
        if current is not None:
            if current.plan.digest != plan.digest:
                raise StalePlanError(
                    f"plan {current.plan.digest} is in force; undo it before applying plan"
                    f" {plan.digest}, or use mindspeed.activate to add to it"
                )
            current._holds += 1
            return current
        _check_installed(plan)
        return _start(plan, strict)


def _start(plan: Plan, strict: bool) -> Handle:
    handle = Handle(plan)
    _state.active = handle
    handle._holds = 1
    try:
        handle._carry_out(plan.acting)
        if strict and handle.report().stale:
            raise PatchError("originals cannot be reached: " + "; ".join(handle.report().stale))
    except BaseException:
        handle._take_back()
        _state.active = None
        raise
    return handle


def activate(config: object, level: int | None = None, device: str = "auto") -> Handle:
    """Plan for a parsed configuration and put the plan in force, adding to what already is.

    After the first optimizer step, patched functions that nobody has called are logged.

    Args:
        config: the parsed arguments: a namespace, a mapping, or an object with attributes.
        level: optimization level; `None` takes `optimization_level` of the configuration, else
            the highest level whose packages are installed.
        device: `cpu`, `npu`, `cuda` or `auto`.

    Raises:
        PlanError: the configuration cannot be served; lists every problem.
        StalePlanError: the plan in force holds steps that this configuration does not want.
    """
    wanted = plan(config, level, device)
    with _state.lock:
        current = _state.active
        if current is None or current.plan.digest == wanted.digest:
            current = apply(wanted)
        else:
            current.extend(wanted)
        current.watch_first_step()
        return current


def _check_installed(plan: Plan) -> None:
    version = installed_version(installed_source())
    if version is not None and version != plan.megatron:
        raise StalePlanError(
            f"plan {plan.digest} was made for megatron-core {plan.megatron}, and {version} is"
            " installed; make the plan again"
        )


def _key(step: Step) -> tuple[str, str, str, str]:
    return step.patch.target, step.patch.kind, step.patch.value, step.feature


def _row(slot: Slot) -> Row:
    return Row(
        target=slot.target,
        kinds=tuple(step.patch.kind for step in slot.steps),
        features=tuple(dict.fromkeys(step.feature for step in slot.steps)),
        status=slot.status,
        calls=None if slot.tally is None else slot.tally.count,
        rebound=slot.rebound,
        stale=tuple(slot.stale),
    )
