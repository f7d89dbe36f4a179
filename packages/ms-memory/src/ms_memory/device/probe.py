"""How long a device's copies take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .protocol import Device, Pair, Stream
from .sim import Sim

SMALL, LARGE = 1 << 16, 1 << 26  # bytes of the copies that are timed
REPEATS = 5


@dataclass(frozen=True)
class Rate:
    """Time of copies in one direction: `latency_ns` each, and bytes at a rate.

    Attributes:
        latency_ns: nanoseconds a copy.
        bytes_per_s: None: no time.
    """

    latency_ns: int = 0
    bytes_per_s: int | None = None

    def time(self, sizes: Iterable[int]) -> int:
        """Return the nanoseconds of copies one after another, each rounded up."""
        return sum(self.latency_ns + self._transfer(nbytes) for nbytes in sizes)

    def _transfer(self, nbytes: int) -> int:
        if self.bytes_per_s is None:
            return 0
        return -(-nbytes * 1_000_000_000 // self.bytes_per_s)


@dataclass(frozen=True)
class Rates:
    """Copies of a device.

    Attributes:
        out: to the host.
        back: from the host.
    """

    out: Rate = Rate()
    back: Rate = Rate()


def probe(device: Device, clock: Callable[[], int] = time.perf_counter_ns) -> Rates:
    """Return what copies of a device take; a simulated one's virtual clock says it.

    Otherwise a small and a large copy to and from pinned memory are timed: their difference gives
    the rate, the rest the latency.

    Args:
        device: whose copies.
        clock: returns nanoseconds.

    Raises:
        RuntimeError: the device is the processor, which copies nothing.
    """
    if isinstance(device, Sim):
        virtual = device.clock
        if virtual is None:
            return Rates()
        return Rates(*(Rate(virtual.latency_ns, virtual.rates[way]) for way in ("d2h", "h2d")))
    out: list[int] = []
    back: list[int] = []
    for nbytes in (SMALL, LARGE):
        host = device.pinned(nbytes)
        here = device.empty_like(host)
        out.append(_timed(device, device.d2h, (host, here), clock))
        back.append(_timed(device, device.h2d, (here, host), clock))
    return Rates(line(*out), line(*back))


def line(small: int, large: int) -> Rate:
    """Return the line through two times, nanoseconds; times that do not rise have no latency.

    Args:
        small: of a copy of `SMALL` bytes.
        large: of `LARGE` bytes.
    """
    if large <= small:
        return Rate(0, LARGE * 1_000_000_000 // max(1, large))
    rate = (LARGE - SMALL) * 1_000_000_000 // (large - small)
    return Rate(max(0, small - SMALL * 1_000_000_000 // max(1, rate)), max(1, rate))


def _timed(device: Device, stream: Stream, pair: Pair, clock: Callable[[], int]) -> int:
    """Return the median nanoseconds of a copy."""
    times = []
    for _ in range(REPEATS):
        ready = device.record()
        ready.synchronize()
        start = clock()
        stream.wait(ready)
        stream.copy([pair]).synchronize()
        times.append(clock() - start)
    return sorted(times)[REPEATS // 2]
