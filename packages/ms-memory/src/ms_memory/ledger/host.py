"""Bytes that lie on the host for the device."""

from __future__ import annotations

from ..errors import refuse


class HostLedger:
    """A balance of host bytes with an upper bound.

    Args:
        limit: bytes that may be out at one time; None: no bound.

    Attributes:
        nbytes: out now.
        peak: most that were out.
        total: taken so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"HostLedger: limit: got {limit}, need 0 or more")
        self.limit = limit
        self.nbytes = 0
        self.peak = 0
        self.total = 0

    def take(self, nbytes: int) -> None:
        """Count bytes that go to the host.

        Raises:
            MemoryFeatureError: E-M32, more than the bound; nothing is counted.
        """
        if self.limit is not None and self.nbytes + nbytes > self.limit:
            where = f"{self.nbytes} bytes are out, {nbytes} more exceed {self.limit}"
            refuse("E-M32", where, "raise host_bytes, or swap fewer layers")
        self.nbytes += nbytes
        self.total += nbytes
        self.peak = max(self.peak, self.nbytes)

    def give(self, nbytes: int) -> None:
        """Count bytes that came back or were dropped."""
        assert nbytes <= self.nbytes, "more bytes come back than are out"
        self.nbytes -= nbytes
