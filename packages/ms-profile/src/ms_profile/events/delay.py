"""Communication that takes a stated time, to show on any machine what is hidden and what is not."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed import Work
from torch.multiprocessing.reductions import StorageWeakRef

from ms_profile import tap
from ms_profile.comm.calls import communicates, transfers
from ms_profile.comm.transfers import flat
from ms_profile.events.work import WorkProxy, release, replaced

__all__ = ["LinkDelay"]


class LinkDelay(tap.Meter):
    """Lets communications on the host finish no sooner than a link of a stated speed would.

        with EventTrace() as trace, LinkDelay(latency=0.02):
            work = dist.all_reduce(x, async_op=True)
            time.sleep(0.02)      # the compute that hides it
            work.wait()           # returns at once

    The real operation runs; who waits for it, or for its future, is held until its time has come.
    Communications of one group follow each other on their link, groups do not disturb each other.
    Meant for tests: enter it inside the meters that shall see the delay.

    Args:
        latency: Seconds per operation.
        seconds_per_byte: Seconds per byte that this rank sends (receives, for a receive).
        group: Name of the group that is slow; all by default.
    """

    def __init__(
        self, latency: float = 0.0, seconds_per_byte: float = 0.0, group: str | None = None
    ) -> None:
        if latency < 0 or seconds_per_byte < 0:
            raise ValueError(f"delays cannot be negative: {latency=}, {seconds_per_byte=}")
        self._latency = latency
        self._per_byte = seconds_per_byte
        self._group = group
        self._free: defaultdict[str, float] = defaultdict(float)  # when each link is free again
        self._ready = 0.0  # when the operation that is being dispatched will be over
        self._in_flight: dict[int, tuple[StorageWeakRef, float]] = {}

    def closed(self) -> None:
        """Forgets the functional operations that nobody waited for."""
        self._in_flight.clear()
        release()

    def before(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Puts an operation on its group's link; holds up `wait_tensor`."""
        self._ready = 0.0
        if communicates(func):
            for group, transfer in transfers(func, args, kwargs):
                if self._group in (None, group.name):
                    sent = transfer.bytes if transfer.op == "recv" else sum(transfer.sent.values())
                    begin = max(time.perf_counter(), self._free[group.name])
                    self._ready = begin + self._latency + self._per_byte * sent
                    self._free[group.name] = self._ready
        elif func._schema.name == "_c10d_functional::wait_tensor":
            storage = args[0].untyped_storage()
            _, ready = self._in_flight.pop(storage._cdata, (None, 0.0))
            sleep_until(ready)

    def after(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        """Gives an operation a handle that is ready no sooner than its link allows."""
        ready, self._ready = self._ready, 0.0
        if not ready:
            return out
        if func.namespace == "c10d":
            return replaced(out, lambda work: _DelayedWork(work, self, ready))
        for tensor in flat(out):
            storage = tensor.untyped_storage()
            self._in_flight[storage._cdata] = StorageWeakRef(storage), ready
        return out


class _DelayedWork(WorkProxy):
    """Ready when the original is and its time has come."""

    def __init__(self, work: Work, maker: LinkDelay, ready: float) -> None:
        super().__init__(work, maker)
        self._ready = ready

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        done = super().wait(*args, **kwargs)
        sleep_until(self._ready)
        return done

    def synchronize(self) -> None:
        self._work.synchronize()
        sleep_until(self._ready)

    def is_completed(self) -> bool:
        return bool(self._work.is_completed()) and time.perf_counter() >= self._ready

    def get_future(self) -> Any:
        original = super().get_future()
        delayed: torch.futures.Future[Any] = torch.futures.Future()

        # Not by `original.then`: that would sleep in this thread if the original is done.
        def finish() -> None:
            try:
                value = original.wait()
            except Exception as error:
                delayed.set_exception(error)
                return
            sleep_until(self._ready)
            delayed.set_result(value)

        threading.Thread(target=finish, daemon=True).start()
        return delayed


def sleep_until(moment: float) -> None:
    """Blocks this thread, not the interpreter."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
