"""A device for tests: copies run when a schedule lets them, and what is gone is poison.

On real hardware a copy that nobody waits for mostly has run in time, so that a missing wait passes
every test and loses data in production. Here "late" runs a copy at the last moment the program
allows, "early" at the first, and a seed at moments in between: a missing wait or a release that is
too early becomes NaN in a tensor, in every run.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .clock import VirtualClock
from .protocol import DeviceStats, Event, Pair

Schedule = Literal["early", "late"] | int
# How often a stream moves when the program turns to the device, by seed.
PACES = (0.03, 0.1, 0.3, 1.0)
POISON = 0xFF  # every byte: NaN in all floating dtypes, -1 in integers


class SimOutOfMemoryError(RuntimeError):
    """The capacity of a simulated device is exceeded."""


def poison(tensor: Tensor) -> None:
    """Fill the whole storage of a tensor with NaN."""
    storage = tensor.untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)


class SimEvent:
    """A point in a copy stream, or in what the program computes (then `stream` is None)."""

    def __init__(self, sim: Sim, stream: SimStream | None, position: int, time: int) -> None:
        self._sim = sim
        self.stream = stream
        self.position = position
        self.time = time

    def wait(self) -> None:
        """Let the program come after it."""
        self._sim.turn()
        self.synchronize()

    def done(self) -> bool:
        """Whether it has passed."""
        return self.stream is None or self.stream.passed >= self.position

    def synchronize(self) -> None:
        """Run what leads to it."""
        if self.stream is not None:
            self.stream.run_to(self.position)
        if self._sim.clock is not None:
            self._sim.clock.wait_until(self.time)


class SimStream:
    """A queue of copies.

    Attributes:
        passed: number of the last entry that ran.
    """

    def __init__(self, sim: Sim, name: str) -> None:
        self._sim = sim
        self._name = name
        self._queue: deque[Callable[[], None]] = deque()
        self._queued = 0
        self.passed = 0
        self._ready = 0  # when its next copy may start, nanoseconds
        self._last = 0  # moment of the program at its last copy
        self._ordered = False

    def wait(self, event: Event) -> None:
        """Let the copies from here on come after an event."""
        assert isinstance(event, SimEvent)
        if event.stream is None:
            # What the program computes between two copies is unknown here, so that each copy needs
            # an event of its own.
            self._ordered = self._ordered or event.position > self._last
        else:
            stream, position = event.stream, event.position
            self._push(lambda: stream.run_to(position))
        self._ready = max(self._ready, event.time)

    def copy(self, pairs: Sequence[Pair]) -> SimEvent:
        """Queue copies; the event follows them."""
        jobs = [_Copy(dst, src, self._name) for dst, src in pairs]
        known, self._ordered = self._ordered, False
        self._last = self._sim.moment()

        def run() -> None:
            # Without a wait a copy that runs at once overtakes the kernels that write its source.
            overtaken = not known and self._sim.chance_of_early()
            for job in jobs:
                job.run(overtaken)

        self._push(run)
        event = SimEvent(self._sim, self, self._queued, self._time(pairs))
        self._sim.turn()
        return event

    def run_to(self, position: int) -> None:
        """Run the entries up to a number."""
        while self.passed < position:
            entry = self._queue.popleft()
            self.passed += 1
            entry()

    def pending(self) -> int:
        """Return how many entries have not run."""
        return len(self._queue)

    def _push(self, entry: Callable[[], None]) -> None:
        self._queue.append(entry)
        self._queued += 1

    def _time(self, pairs: Sequence[Pair]) -> int:
        clock = self._sim.clock
        if clock is None:
            return 0
        nbytes = sum(src.numel() * src.element_size() for _, src in pairs)
        self._ready = max(self._ready, clock.now) + clock.duration(self._name, nbytes)
        return self._ready


class _Copy:
    """One copy; the side on the device is known by a weak reference, as hardware knows it."""

    def __init__(self, dst: Tensor, src: Tensor, direction: str) -> None:
        if dst.shape != src.shape or dst.dtype != src.dtype:
            got = f"{dst.dtype}{tuple(dst.shape)} from {src.dtype}{tuple(src.shape)}"
            raise ValueError(f"copy: got {got}, need one shape and dtype")
        self.out = direction == "d2h"
        self.host = dst if self.out else src
        self.remote = _Remote(src if self.out else dst)

    def run(self, overtaken: bool) -> None:
        """Copy what is there; poison for what is not."""
        remote = self.remote.tensor()
        with torch.no_grad():
            if self.out:
                if remote is None or overtaken:
                    self.host.view(-1).view(torch.uint8).fill_(POISON)
                else:
                    self.host.copy_(remote)
            elif remote is not None:
                remote.copy_(self.host)
                if overtaken:
                    poison(remote)


class _Remote:
    """A tensor on the device, as long as others keep its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype = tensor.dtype
        self.nbytes = tensor.untyped_storage().nbytes()

    def tensor(self) -> Tensor | None:
        storage = self.storage()
        if storage is None or storage.nbytes() < self.nbytes:
            return None
        flat = torch.empty(0, dtype=self.dtype)
        flat.set_(storage, *self.layout)
        return flat


class Sim:
    """See `sim`."""

    name = "sim"

    def __init__(
        self, capacity: int | None, schedule: Schedule, clock: VirtualClock | None
    ) -> None:
        if not isinstance(schedule, int) and schedule not in ("early", "late"):
            raise ValueError(f"sim: schedule: got {schedule!r}, need 'early', 'late' or a seed")
        self.capacity = capacity
        self.schedule = schedule
        self.clock = clock
        self.d2h = SimStream(self, "d2h")
        self.h2d = SimStream(self, "h2d")
        self._random = random.Random(schedule if isinstance(schedule, int) else 0)
        # Some seeds are nearly late, some nearly early: mistakes need one or the other to show.
        self._pace = self._random.choice(PACES)
        self._moment = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._peak = 0
        self._pinned = 0

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device: all of the processor's memory counts as it."""
        return tensor.device.type == "cpu"

    def record(self) -> SimEvent:
        """Return an event after all that the program computed so far."""
        self.turn()
        return SimEvent(self, None, self.moment(), 0 if self.clock is None else self.clock.now)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return a poisoned tensor of a shape and dtype.

        Raises:
            SimOutOfMemoryError: the capacity is exceeded.
        """
        self.turn()
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        poison(out)
        self.adopt(out)
        return out

    def adopt(self, tensor: Tensor) -> None:
        """Count a tensor's storage, while it lives.

        Raises:
            SimOutOfMemoryError: the capacity is exceeded.
        """
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is None or known() is not storage:
            self._storages[key] = weakref.ref(storage)
        allocated = self._allocated()
        if self.capacity is not None and allocated > self.capacity:
            del self._storages[key]
            more = f"{storage.nbytes()} bytes more make {allocated}"
            raise SimOutOfMemoryError(f"sim: {more} of {self.capacity}")
        self._peak = max(self._peak, allocated)

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Count every tensor that operators make within."""
        with _Tracking(self):
            yield

    def pinned(self, nbytes: int) -> Tensor:
        """Return poisoned host memory, uint8 [nbytes]."""
        self._pinned += nbytes
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        # Made by no operator: a census of the device's storages does not see the host's.
        out = torch.frombuffer(bytearray(nbytes), dtype=torch.uint8)
        poison(out)
        return out

    def unused(self, host: Tensor) -> None:
        """Poison host memory that nobody wants any more."""
        self.turn()
        poison(host)

    def empty_storage(self, tensor: Tensor) -> None:
        """Poison a tensor's bytes and give them back."""
        self.turn()
        poison(tensor)
        tensor.untyped_storage().resize_(0)

    def restore_storage(self, tensor: Tensor, nbytes: int) -> None:
        """Give an emptied tensor its bytes again, poisoned."""
        tensor.untyped_storage().resize_(nbytes)
        poison(tensor)
        self.adopt(tensor)

    def stats(self) -> DeviceStats:
        """Return the bytes of the storages that were counted."""
        return DeviceStats(self._allocated(), self._peak, self._pinned)

    def reset_peak(self) -> None:
        """Let the peak start from what is allocated now."""
        self._peak = self._allocated()

    def moment(self) -> int:
        """Return a number that grows with each call."""
        self._moment += 1
        return self._moment

    def chance_of_early(self) -> bool:
        """Whether a copy that may run at once did so."""
        if isinstance(self.schedule, int):
            return self._random.random() < 0.5
        return self.schedule == "early"

    def turn(self) -> None:
        """Let the streams run as far as the schedule wants."""
        if self.schedule == "late":
            return
        for stream in (self.d2h, self.h2d):
            pending = stream.pending()
            if isinstance(self.schedule, int):
                moves = self._random.random() < self._pace
                pending = self._random.randint(0, pending) if moves else 0
            stream.run_to(stream.passed + pending)

    def _allocated(self) -> int:
        alive = {k: s for k, r in self._storages.items() if (s := r()) is not None}
        self._storages = {k: self._storages[k] for k in alive}
        return sum(s.nbytes() for s in alive.values())


class _Tracking(TorchDispatchMode):
    def __init__(self, sim: Sim) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sim = sim

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._sim.adopt(leaf)
        return out


def sim(
    capacity: int | None = None, schedule: Schedule = "late", clock: VirtualClock | None = None
) -> Sim:
    """Return a simulated device on the processor's memory.

    Args:
        capacity: bytes that may be allocated at one time; None: any. What counts is what was made
            by the device, `adopt` or within `tracking`.
        schedule: when copies run: "early", as soon as they are queued; "late", when something
            waits for them; a number: at random moments in between, the same for the same number.
        clock: counts how long copies take and how long the program waits for them.
    """
    return Sim(capacity, schedule, clock)
