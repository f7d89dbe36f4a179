"""Time of a device that computes and copies nothing for real."""

from __future__ import annotations


class VirtualClock:
    """Counts nanoseconds of computing, copying and waiting, exactly.

    Args:
        out_bytes_per_s: rate of copies to the host.
        in_bytes_per_s: rate of copies from the host.
        latency_ns: of each batch of copies.

    Attributes:
        now: what has passed for the program.
        stalled: how much of it the program waited for copies.
    """

    def __init__(self, out_bytes_per_s: int, in_bytes_per_s: int, latency_ns: int = 0) -> None:
        if out_bytes_per_s <= 0 or in_bytes_per_s <= 0 or latency_ns < 0:
            got = (out_bytes_per_s, in_bytes_per_s, latency_ns)
            raise ValueError(f"VirtualClock: got {got}, need positive rates, a latency from 0")
        self.rates = {"d2h": out_bytes_per_s, "h2d": in_bytes_per_s}
        self.latency_ns = latency_ns
        self.now = 0
        self.stalled = 0

    def advance(self, ns: int) -> None:
        """Compute for a time."""
        self.now += ns

    def duration(self, stream: str, nbytes: int) -> int:
        """Return how long a copy takes, nanoseconds, rounded up."""
        return self.latency_ns - (-nbytes * 1_000_000_000 // self.rates[stream])

    def wait_until(self, moment: int) -> None:
        """Wait for a moment; nothing where it has passed."""
        late = max(0, moment - self.now)
        self.stalled += late
        self.now += late
