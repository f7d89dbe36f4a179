"""What is kept for backward, judged at the moments in which a backward begins."""

from __future__ import annotations

from collections import Counter

from ms_profile.memory.census import StorageCensus

__all__ = ["KeptForBackward"]


class KeptForBackward:
    """The running figures.

    Attributes:
        peak: most bytes at the begin of a backward.
        total: bytes at the begin of all backwards, each storage counted once.
        by_module: the bytes of `peak` by the module that made them.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.total = 0
        self.by_module: dict[str, int] = {}

    def judge(self, census: StorageCensus) -> None:
        """Counts what forward made and is alive."""
        by_module: Counter[str] = Counter()
        for held in census:
            if held.kind == "activation":
                by_module[held.birth[1]] += held.nbytes
                self.total += 0 if held.counted else held.nbytes
                held.counted = True
        now = sum(by_module.values())
        if now > self.peak:
            self.peak = now
            self.by_module = dict(by_module)
