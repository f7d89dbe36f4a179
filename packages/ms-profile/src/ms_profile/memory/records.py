"""What the memory meter hands out: plain frozen data, made when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ms_profile.memory.census import Birth, Held, Kind

__all__ = ["BLOCK", "Holding", "Mark", "Peak", "Snapshot", "Timeline"]

BLOCK = 512  # bytes to which the caching allocators of CUDA and NPU round a tensor's memory


@dataclass(frozen=True)
class Holding:
    """One living storage: its size in bytes, its kind, and where it came from."""

    nbytes: int
    kind: Kind
    birth: Birth


@dataclass(frozen=True)
class Snapshot:
    """The living storages of one moment."""

    holdings: tuple[Holding, ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[Held, int]]) -> Snapshot:
        """The storages of a census with their bytes."""
        return cls(tuple(Holding(n, held.kind, held.describe()) for held, n in pairs))

    @property
    def nbytes(self) -> int:
        """Sum of the storages' bytes."""
        return sum(each.nbytes for each in self.holdings)

    @property
    def allocated(self) -> int:
        """The same with every storage rounded up to whole blocks of 512 bytes."""
        return sum(-(-each.nbytes // BLOCK) * BLOCK for each in self.holdings)

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by kind."""
        return self._by(lambda each: each.kind)

    @property
    def by_module(self) -> dict[str, int]:
        """Bytes by the module in which they were made; "" is outside of all modules."""
        return self._by(lambda each: each.birth.module)

    @property
    def by_device(self) -> dict[str, int]:
        """Bytes by device."""
        return self._by(lambda each: str(each.birth.device))

    def largest(self, count: int = 10) -> tuple[Holding, ...]:
        """The largest storages."""
        return tuple(sorted(self.holdings, key=lambda each: -each.nbytes)[:count])

    def _by(self, key: Callable[[Holding], str]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for each in self.holdings:
            sums[key(each)] += each.nbytes
        return dict(sums)


@dataclass(frozen=True)
class Mark:
    """The state at a moment that the user named.

    Attributes:
        name: given by the user.
        index: operators dispatched before it.
        seconds: since the meter was entered.
        live: bytes of all followed storages.
        saved: bytes kept for backward; see `MemoryMeter.saved`.
        by_kind: the live bytes, divided.
        by_device: the live bytes, divided.
        allocated: the live bytes, every storage rounded up to whole blocks of 512 bytes.
    """

    name: str
    index: int
    seconds: float
    live: int
    saved: int
    by_kind: dict[str, int]
    by_device: dict[str, int]
    allocated: int


@dataclass(frozen=True)
class Peak:
    """The moment with the most live bytes; the first one, if there are several.

    Attributes:
        nbytes: live bytes then.
        index: operators dispatched before the one that reached it; -1: nothing was made since.
        seconds: since the meter was entered.
        op: the operator that reached it.
        module: dotted path of its module.
        phase: see `ms_profile.tap.phase`.
        snapshot: what was alive.
        exact: false if `nbytes` is only an upper bound, as some storage was emptied by Python code
            shortly before or after; see `resizes` of `MemoryMeter`.
    """

    nbytes: int
    index: int
    seconds: float
    op: str
    module: str
    phase: str
    snapshot: Snapshot
    exact: bool


class Timeline:
    """Live bytes after every operator that changed them, in at most `limit` points.

    When it is full, each pair of neighbours is replaced by the higher of the two.
    """

    def __init__(self, limit: int) -> None:
        if limit < 2:
            raise ValueError(f"timeline has room for {limit} points, it needs at least 2")
        self.limit = limit
        self.points: list[tuple[int, float, int]] = []

    def add(self, index: int, seconds: float, live: int) -> None:
        """Appends a point."""
        points = self.points
        points.append((index, seconds, live))
        if len(points) > self.limit:
            self.points = [_higher(points[i : i + 2]) for i in range(0, len(points), 2)]


def _higher(points: Sequence[tuple[int, float, int]]) -> tuple[int, float, int]:
    return max(points, key=lambda point: point[2])
