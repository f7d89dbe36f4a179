"""When communications are launched and waited for, and what is computed in between."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch._ops import OpOverload
from torch.distributed import Work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as module_hooks

from ms_profile import modules, tap
from ms_profile.comm.calls import communicates, phase, transfers
from ms_profile.comm.transfers import flat
from ms_profile.events.record import Event, Log, union
from ms_profile.events.work import WorkProxy, release, replaced
from ms_profile.report.chrome import trace_events

__all__ = ["EventTrace"]


class EventTrace(tap.Meter):
    """Records launches and waits of communications, operators, modules and marks in their order.

        with EventTrace() as trace:
            work = dist.all_to_all_single(out, x, async_op=True)
            with trace.mark("shared expert"):
                y = shared(x)
            work.wait()
        assert trace.happens_before("launch:all_to_all", "begin:shared expert")
        assert trace.happens_before("end:shared expert", "wait:all_to_all")

    An edge is written `edge:name#index`: `launch`, `wait`, `waited` (the wait returned) and `done`
    (the communication finished) of a communication, `begin` and `end` of everything else. The
    index counts those of one name from 0 and may lack where there is only one.

    Args:
        ops: Record every operator that computes (not views).
        forwards: Record the forward of every module, by its path.
    """

    watches_modules: ClassVar[bool] = True

    def __init__(self, *, ops: bool = True, forwards: bool = True) -> None:
        self._ops = ops
        self._forwards = forwards
        self._log = Log()
        self._lock = threading.Lock()
        self._start = self._epoch = 0.0
        self._seen: Counter[tuple[bool, str]] = Counter()
        self._open: Event | None = None
        self._stack: list[Event] = []
        self._in_flight: dict[int, tuple[StorageWeakRef, Event]] = {}
        self._launches: dict[str, Event] = {}
        self._over: set[str] = set()
        self._handles: tuple[Any, ...] = ()

    def opened(self) -> None:
        """Forgets what an earlier use recorded."""
        self._log = Log()
        self._seen.clear()
        self._launches.clear()
        self._over.clear()
        self._stack.clear()
        self._start, self._epoch = time.perf_counter(), time.time()
        if self._forwards:
            self._handles = (
                module_hooks.register_module_forward_pre_hook(self._forward_began),
                module_hooks.register_module_forward_hook(self._forward_ended, always_call=True),
            )

    def closed(self) -> None:
        """Stops listening to what is still under way."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._in_flight.clear()
        release()

    # What the dispatcher tells.

    def before(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Opens the event of an operator."""
        self._open = None
        if communicates(func):
            # A functional batch of sends and receives is one launch, named after its first.
            for group, transfer in itertools.islice(transfers(func, args, kwargs), 1):
                self._open = self._begin(transfer.op, "launch", group.name)
                self._launches[self._open.key] = self._open
        elif func._schema.name == "_c10d_functional::wait_tensor":
            self._open = self._begin_wait(self._launch_of(args[0]))
        elif self._ops and (name := _computes(func)):
            self._open = self._begin(name, "compute")

    def after(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        """Closes it, and puts a listener around the Work of a communication."""
        event, self._open = self._open, None
        if event is None:
            return out
        self._end(event)
        if event.kind != "launch":
            return out
        if func.namespace != "c10d":
            for tensor in flat(out):
                storage = tensor.untyped_storage()
                self._in_flight[storage._cdata] = StorageWeakRef(storage), event
            return out
        on_host = all(tensor.device.type == "cpu" for tensor in flat(_tensors(args)))
        return replaced(out, lambda work: self._listen(work, event, on_host))

    def _listen(self, work: Work, launch: Event, on_host: bool) -> Work:
        proxy = _TracedWork(work, self, launch)
        if on_host:
            # On a device the future is done when the work is queued: that tells nothing.
            try:
                proxy.future = work.get_future()
            except RuntimeError:  # point-to-point of gloo has none
                return proxy
            proxy.future.add_done_callback(lambda _: self._done(launch, time.perf_counter()))
        return proxy

    def _launch_of(self, tensor: torch.Tensor) -> Event | None:
        flight = self._in_flight.pop(tensor.untyped_storage()._cdata, None)
        return None if flight is None else flight[1]

    # Events and edges.

    def _begin(self, name: str, kind: Any, group: str = "", module: str | None = None) -> Event:
        number = (kind == "launch", name)
        now = time.perf_counter() - self._start
        index = self._seen[number]
        self._seen[number] += 1
        where = tap.module() if module is None else module
        event = Event(name, kind, now, now, group, index, phase(), where)
        self._log.events.append(event)
        self._log.edges.append(("launch" if kind == "launch" else "begin", event, now))
        return event

    def _end(self, event: Event) -> None:
        event.end = time.perf_counter() - self._start
        if event.kind != "launch":
            edge = "waited" if event.kind == "wait" else "end"
            self._log.edges.append((edge, event, event.end))

    def _begin_wait(self, launch: Event | None) -> Event | None:
        if launch is None or not self._hears(launch):
            return None
        now = time.perf_counter() - self._start
        event = replace(launch, kind="wait", begin=now, end=now)
        event.phase, event.module = phase(), tap.module()
        self._log.events.append(event)
        self._log.edges.append(("wait", event, now))
        return event

    @contextmanager
    def _waiting(self, launch: Event, ends: bool) -> Iterator[None]:
        """A wait for a communication; `ends` if the communication is over when it returns."""
        event = self._begin_wait(launch)
        yield
        if event is not None and self._hears(launch):
            if ends:
                self._done(launch, time.perf_counter())
            self._end(event)

    def _hears(self, launch: Event) -> bool:
        """Whether the trace is on, and in the same use as when the launch happened."""
        return self.is_on and self._launches.get(launch.key) is launch

    def _done(self, launch: Event, moment: float) -> None:
        """A communication is known to be over; the first that says so is right."""
        with self._lock:
            if launch.key in self._over or not self._hears(launch):
                return
            self._over.add(launch.key)
            end = moment - self._start
            self._log.edges.append(("done", launch, end))
            self._log.events.append(replace(launch, kind="comm", end=end))

    def _forward_began(self, module: nn.Module, args: Any) -> None:
        path = modules.path_of(module)
        self._stack.append(self._begin(path, "mark", module=path))

    def _forward_ended(self, module: nn.Module, args: Any, out: Any) -> None:
        path = modules.path_of(module)
        # What raised before its hook could run ends with the module around it.
        while self._stack:
            event = self._stack.pop()
            self._end(event)
            if event.name == path:
                break

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Names a span of the program; outside of the trace it does nothing."""
        event = self._begin(name, "mark") if self.is_on else None
        try:
            yield
        finally:
            if event is not None:
                self._end(event)

    # Questions.

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything recorded, in order of begin, completions where they became known."""
        return tuple(self._log.events)

    @property
    def edges(self) -> tuple[str, ...]:
        """`edge:name#index` of everything in the order in which it happened."""
        return tuple(self._log.names())

    def order(self, *edges: str) -> tuple[str, ...]:
        """The given edges in the order in which they happened."""
        return tuple(sorted(edges, key=self._log.place))

    def happens_before(self, first: str, second: str) -> bool:
        """Whether the edge `first` happened before the edge `second`.

        Raises:
            LookupError: one of them did not happen, or happened several times and no number says
                which is meant.
        """
        return self._log.place(first) < self._log.place(second)

    def intervals(self, name: str) -> list[tuple[float, float]]:
        """Begin and end in seconds of all operators, modules and marks of a name, or of one."""
        return [(event.begin, event.end) for event in self._log.of(name, "compute", "mark")]

    def completed(self, name: str) -> float | None:
        """When a communication was over, in seconds; None where the backend does not tell."""
        ends = [event.end for event in self._log.of(self._launched(name).key, "comm")]
        return ends[0] if ends else None

    def overlapped(self, name: str, by: str | None = None) -> float:
        """Seconds of compute between the launch of a communication and the first wait for it.

        Where the end of the communication is known, compute after that is left out; else this is
        the most that can have overlapped.

        Args:
            name: The communication.
            by: Name of the operators, modules or marks that count; all operators by default.
        """
        launch = self._launched(name)
        waits = [event.begin for event in self._log.of(launch.key, "wait")]
        limits = [*waits[:1], self.completed(launch.key), self._log.edges[-1][2]]
        if by is None:
            work = [(e.begin, e.end) for e in self._log.events if e.kind == "compute"]
        else:
            work = self.intervals(by)
        return union(work, launch.end, min(limit for limit in limits if limit is not None))

    def _launched(self, name: str) -> Event:
        return self._log.edges[self._log.place(f"launch:{name}")][1]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON; `start` is the time of the epoch at 0 seconds."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        events = [asdict(event) for event in self._log.events]
        data = {"kind": "events", "version": 1, "rank": rank, "start": self._epoch}
        return {**data, "events": events}

    def chrome_trace(self) -> dict[str, Any]:
        """The trace for chrome://tracing or Perfetto, to be written as JSON."""
        return {"displayTimeUnit": "ms", "traceEvents": trace_events([self.as_dict()])}


class _TracedWork(WorkProxy):
    """Tells a trace of waits."""

    def __init__(self, work: Work, trace: EventTrace, launch: Event) -> None:
        super().__init__(work, trace)
        self._trace = trace
        self._launch = launch
        self.future: Any = None

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        with self._trace._waiting(self._launch, self.future is not None):
            return super().wait(*args, **kwargs)

    def synchronize(self) -> None:
        with self._trace._waiting(self._launch, False):
            self._work.synchronize()

    def block_current_stream(self) -> None:
        with self._trace._waiting(self._launch, False):
            self._work.block_current_stream()


def _tensors(things: Any) -> Iterator[torch.Tensor]:
    """All tensors among arguments."""
    if isinstance(things, torch.Tensor):
        yield things
    elif isinstance(things, list | tuple):
        for each in things:
            yield from _tensors(each)


@cache
def _computes(func: OpOverload) -> str:
    """Name of an operator that does work: it is no view and belongs to no book-keeping."""
    returned = (value.alias_info for value in func._schema.returns)
    view = any(alias is not None and not alias.is_write for alias in returned)
    if view or func.namespace in ("_c10d_functional", "c10d", "profiler"):
        return ""
    return str(func._schema.name).replace("::", ".")
