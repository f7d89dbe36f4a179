"""The memory meter: a census of storages, taken at every operator."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from typing_extensions import Self

from ms_profile import tap
from ms_profile.memory.census import Held, Kind, storages, tensors_of
from ms_profile.memory.compiled import compiled_results
from ms_profile.memory.kept import KeptForBackward
from ms_profile.memory.made import Made, is_on, made_by
from ms_profile.memory.owners import Owners
from ms_profile.memory.records import Holding, Mark, Peak, Snapshot, Timeline
from ms_profile.memory.watch import Moment, PeakWatch

__all__ = ["MemoryMeter"]

# backward() makes the first gradient with it.
_SEED = torch.ops.aten.ones_like.default
# Questions of a fake tensor about itself; a real one asks none.
_NO_OPERATOR = torch.ops.prim.device.default
_COMPILED = "torch.compile"
_IN_FORWARD = ("forward", "recompute")
_IN_BACKWARD = ("backward", "recompute")


class MemoryMeter(tap.Meter):
    """Live bytes at every operator, exact; who made them and what they are.

        with MemoryMeter(model, optimizer) as meter:
            loss = model(x).mean()
            meter.mark("forward", outputs=loss)
            loss.backward()
            optimizer.step()
        meter.peak.nbytes, meter.peak.module, meter.peak.snapshot.by_kind
        meter.saved_peak
        meter.leaks(expected=loss)

    Followed are the storages that operators make inside the context, and those of `given`. Memory
    that was there before and is not given does not count.

    Args:
        given: modules, optimizers and tensors that exist already and shall count. An optimizer is
            anything with `param_groups` and `state`.
        exclude: modules and tensors that exist already and shall not count; their gradients do,
            and are known as such.
        device: count only what is on this device ("cuda:1"), or on all of its type ("cuda").
        resizes: look through all storages for sizes changed by `UntypedStorage.resize_` at every
            new peak (True), only at marks (False), or at every new peak as long as there are few
            storages or such a change was seen, else at some (None). A change that is seen late
            leaves the peak an upper bound, and `peak.exact` false.
        points: most points of the timeline.
        sample_every: measure the first of so many entries; the others cost nothing and leave what
            was measured. So enter it once a step.

    Raises:
        TypeError: `given` holds something else.
        ValueError: `points` below 2, `sample_every` below 1.
    """

    watches_modules = True

    def __init__(
        self,
        *given: Any,
        exclude: nn.Module | Tensor | Sequence[nn.Module | Tensor] = (),
        device: torch.device | str | None = None,
        resizes: bool | None = None,
        points: int = 1 << 16,
        sample_every: int = 1,
    ) -> None:
        if sample_every < 1:
            raise ValueError(f"MemoryMeter: sample_every: got {sample_every}, need 1 or more")
        excluded = (exclude,) if isinstance(exclude, nn.Module | Tensor) else tuple(exclude)
        self._owners = Owners(given, excluded)
        self._device = None if device is None else torch.device(device)
        self._resizes = resizes
        self._points = points
        self._every = sample_every
        self._entries = 0
        self._passing = False
        self._reset()

    def _reset(self) -> None:
        self._peak = PeakWatch(self._resizes)
        self._census = self._peak.census
        self._timeline = Timeline(self._points)
        self._start = time.perf_counter()
        self._index = 0
        self._last_live = -1
        self._phase = "other"
        self._highest: dict[str, int] = {}
        self._made: Counter[str] = Counter()
        self._seed: Held | None = None
        self._marks: list[Mark] = []
        self._kept = KeptForBackward()

    # Reading.

    @property
    def live(self) -> int:
        """Bytes of the followed storages that are alive now."""
        self._peak.sweep()
        return self._census.nbytes

    @property
    def saved(self) -> int:
        """Bytes kept for backward now: made in a forward, alive, and held by no one known.

        Read it between forward and backward, when no module is running: what the forward made is
        then held by the autograd graph or by the caller. What the caller holds counts unless
        `mark(outputs=...)` has named it.
        """
        self._identify()
        return sum(held.nbytes for held in self._census if held.kind == "activation")

    @property
    def saved_peak(self) -> int:
        """Most bytes kept for backward when a backward began."""
        return self._kept.peak

    @property
    def saved_total(self) -> int:
        """Bytes kept for backward when a backward began; each storage once in the whole run."""
        return self._kept.total

    @property
    def peak(self) -> Peak:
        """The moment with the most live bytes."""
        self._identify()
        return self._peak.record()

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What `mark` returned so far."""
        return tuple(self._marks)

    @property
    def timeline(self) -> list[tuple[int, float, int]]:
        """(operators dispatched before, seconds since entry, live bytes), where these changed."""
        return list(self._timeline.points)

    def snapshot(self) -> Snapshot:
        """What is alive now."""
        self._identify()
        return Snapshot.of((held, held.nbytes) for held in self._census)

    def leaks(self, expected: Any = ()) -> tuple[Holding, ...]:
        """Storages made inside the context, alive, that nobody is known to hold.

        After backward and with nothing else kept there must be none. Known are the parameters,
        buffers and gradients of the modules and the states of the optimizers that the meter got.

        Args:
            expected: tensors that the caller keeps, in any nest of lists and dicts.
        """
        self._identify()
        known = {id(s) for tensor in tensors_of(expected) for s in storages(tensor)}
        return tuple(
            Holding(held.nbytes, held.kind, held.describe())
            for held in self._census
            if held.nbytes and held.kind in ("activation", "other") and held.key not in known
        )

    def mark(self, name: str, outputs: Any = ()) -> Mark:
        """Notes the state of this moment under a name.

        Args:
            name: any text.
            outputs: tensors that the caller holds, in any nest of lists and dicts: they are not
                counted as kept for backward, from now on, even if the graph holds them too.
        """
        for tensor in tensors_of(outputs):
            for storage in storages(tensor):
                held = self._census.find(storage)
                if held is not None and held.kind == "activation":
                    held.kind = "other"
        now = self.snapshot()
        mark = Mark(
            name=name,
            index=self._index,
            seconds=time.perf_counter() - self._start,
            live=now.nbytes,
            saved=now.by_kind.get("activation", 0),
            by_kind=now.by_kind,
            by_device=now.by_device,
            allocated=now.allocated,
        )
        self._marks.append(mark)
        return mark

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON: bytes as integers, times in seconds since entry."""
        peak = self.peak
        at_peak = peak.snapshot.by_module
        paths = sorted({*self._made, *self._highest, *at_peak, *self._kept.by_module})
        return {
            "kind": "memory",
            "version": 1,
            "peak": {
                "bytes": peak.nbytes,
                "module": peak.module,
                "phase": peak.phase,
                "op": peak.op,
                "index": peak.index,
                "seconds": peak.seconds,
                "allocated": peak.snapshot.allocated,
                "by_kind": peak.snapshot.by_kind,
                "by_device": peak.snapshot.by_device,
            },
            "saved": {"total": self._kept.total, "peak": self._kept.peak},
            "marks": [vars(mark) for mark in self._marks],
            "timeline": [list(point) for point in self._timeline.points],
            "by_module": {
                path: {
                    "made": self._made.get(path, 0),
                    "at_peak": at_peak.get(path, 0),
                    "saved": self._kept.by_module.get(path, 0),
                    "highest": self._highest.get(path, 0),
                }
                for path in paths
            },
        }

    # Hearing.

    def __enter__(self) -> Self:
        if self._passing:
            raise RuntimeError("this MemoryMeter is on already: make a second one to nest them")
        if not self.is_on and self._entries % self._every:
            self._passing = True
        else:
            super().__enter__()
        self._entries += 1
        return self

    def __exit__(self, *exc: object) -> None:
        if self._passing:
            self._passing = False
        else:
            super().__exit__(*exc)

    def opened(self) -> None:
        """Starts anew and follows what is given."""
        self._reset()
        for tensor, kind in self._owners.given():
            self._follow(tensor, kind)
        self._peak.nbytes = self._last_live = self._census.nbytes
        self._timeline.add(-1, 0.0, self._last_live)

    def closed(self) -> None:
        """Stops following; what was measured stays readable."""
        self._identify()
        self._census.stop()

    def after(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        """Takes what the operator made, and the sizes that it changed, into the books."""
        if func is _NO_OPERATOR:
            return out
        census = self._census
        census.poll()
        phase = tap.phase()
        if phase != self._phase:
            self._phase_changes(phase)
        self._seed = None
        if phase in _IN_FORWARD:
            compiled = compiled_results(census, args, self._device)
            if compiled:
                self._add(compiled, _COMPILED, phase)
        made = made_by(census, func, args, kwargs, out, self._device)
        if made:
            self._add(made, func, phase)
        if census.nbytes != self._last_live:
            self._last_live = census.nbytes
            self._timeline.add(self._index, time.perf_counter() - self._start, census.nbytes)
        self._index += 1
        return out

    def _add(self, made: Sequence[Made], func: OpOverload | str, phase: str) -> None:
        census = self._census
        nbytes = 0
        for _, storage in made:
            nbytes += storage.nbytes()
        certain = self._peak.expects(nbytes)
        module = tap.module()
        kind: Kind = "activation" if phase in _IN_FORWARD else "other"
        index = self._index
        for tensor, storage in made:
            birth = (func, module, phase, index, tensor.shape, tensor.dtype, tensor.device)
            held = census.add(storage, kind, birth)
            if func is _SEED:
                self._seed = held
        live = census.nbytes
        if live > self._peak.nbytes:
            seconds = time.perf_counter() - self._start
            self._peak.rises(Moment(index, seconds, func, module, phase), certain)
        self._made[module] += nbytes
        if live > self._highest.get(module, 0):
            self._highest[module] = live

    def _follow(self, tensor: Tensor, kind: Kind) -> None:
        if is_on(tensor, self._device):
            birth = ("", "", "", -1, tensor.shape, tensor.dtype, tensor.device)
            for storage in storages(tensor):
                if self._census.find(storage) is None:
                    self._census.add(storage, kind, birth)

    def _phase_changes(self, phase: str) -> None:
        was_inside, inside = self._phase in _IN_BACKWARD, phase in _IN_BACKWARD
        self._phase = phase
        if inside and not was_inside:
            if self._seed is not None:
                self._seed.kind = "other"
            self._peak.sweep()
            self._kept.judge(self._census)
        elif was_inside and not inside:
            self._identify()  # gradients may be gone when somebody asks

    def _identify(self) -> None:
        """Brings sizes up to date and names what has turned out to be a gradient or a state."""
        self._peak.sweep()
        for tensor, kind in (*self._owners.given(), *self._owners.gradients()):
            for storage in storages(tensor):
                held = self._census.find(storage)
                if held is not None:
                    held.kind = kind
