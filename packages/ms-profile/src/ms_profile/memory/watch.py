"""The peak: when it was, what was alive then, and whether sizes were up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ms_profile.memory.census import Held, StorageCensus
from ms_profile.memory.records import Peak, Snapshot

__all__ = ["Moment", "PeakWatch"]

_FEW = 1000  # storages: so many are looked through at every new peak
_RARELY = 64  # of n more, all are looked through after n / 64 new peaks


@dataclass(frozen=True)
class Moment:
    """An operator that reached a new peak; see `Peak` for the fields."""

    index: int = -1
    seconds: float = 0.0
    op: Any = ""
    module: str = ""
    phase: str = ""


class PeakWatch:
    """Owns the census and remembers its highest sum.

    What was alive at the peak is what still is, and what has died or changed since: only that is
    written down, so that a rising curve costs nothing.

    Args:
        resizes: see `MemoryMeter`.
    """

    def __init__(self, resizes: bool | None) -> None:
        self.census = StorageCensus(self._before_change)
        self.nbytes = 0
        self._resizes = resizes
        self._moment = Moment()
        self._since: dict[int, tuple[Held, int]] = {}
        self._exact = True
        self._doubtful = False  # reached with sizes that were not looked at
        self._unlooked = 0  # peaks since sizes were looked at

    def expects(self, nbytes: int) -> bool:
        """Whether all sizes are known to be right; called before `nbytes` more are counted."""
        if self.census.nbytes + nbytes <= self.nbytes:
            return False
        self._unlooked += 1
        look = self._resizes
        if look is None:
            count = len(self.census)
            few = count < _FEW or self._unlooked * _RARELY > count
            look = few or self.census.resized_unseen > 0
        if look:
            self.sweep()
        return look

    def rises(self, moment: Moment, certain: bool) -> None:
        """Takes the present sum as the new peak."""
        self.nbytes = self.census.nbytes
        self._moment = moment
        self._since = {}
        self._exact = True
        self._doubtful = not certain

    def sweep(self) -> None:
        """Brings all sizes up to date."""
        census = self.census
        seen = census.resized_unseen
        census.sweep()
        if self._doubtful and census.resized_unseen > seen:
            self._exact = False
        self._doubtful = False
        self._unlooked = 0

    def record(self) -> Peak:
        """The peak, with what was alive."""
        at, since = self._moment, self._since
        still = (
            (held, held.nbytes)
            for held in self.census
            if held.birth[3] <= at.index and held.key not in since
        )
        alive = Snapshot.of([*since.values(), *still])
        return Peak(
            self.nbytes, at.index, at.seconds, str(at.op), at.module, at.phase, alive, self._exact
        )

    def _before_change(self, held: Held) -> None:
        if held.birth[3] <= self._moment.index and held.key not in self._since:
            self._since[held.key] = held, held.nbytes
