"""Live bytes over the events of a step, measured or replayed from a plan."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """One moment.

    Attributes:
        name: what happened.
        nbytes: alive after it.
    """

    name: str
    nbytes: int


@dataclass
class Timeline:
    """Bytes that come and go, in order.

    Attributes:
        base: bytes alive from the beginning to the end.
        events: so far.
    """

    base: int = 0
    events: list[Event] = field(default_factory=list)
    _blocks: dict[object, int] = field(default_factory=dict, repr=False)
    _alive: int = field(default=0, repr=False)

    @property
    def nbytes(self) -> int:
        """Alive now."""
        return self.base + self._alive

    @property
    def peak(self) -> Event:
        """The first event with the most bytes alive; the base where there was none."""
        return max(self.events, key=lambda e: e.nbytes, default=Event("base", self.base))

    def alloc(self, key: object, nbytes: int, name: str = "") -> None:
        """A block comes to life.

        Raises:
            ValueError: it is alive already.
        """
        if key in self._blocks:
            raise ValueError(f"Timeline: block: got {key!r} twice, need it freed in between")
        self._blocks[key] = nbytes
        self._alive += nbytes
        self.mark(name or f"alloc {key}")

    def free(self, key: object, name: str = "") -> None:
        """A block dies.

        Raises:
            ValueError: it is not alive.
        """
        if key not in self._blocks:
            raise ValueError(f"Timeline: block: got {key!r}, need one that is alive")
        self._alive -= self._blocks.pop(key)
        self.mark(name or f"free {key}")

    def mark(self, name: str) -> None:
        """Note a moment in which nothing comes or goes."""
        self.events.append(Event(name, self.nbytes))

    def alive(self) -> dict[object, int]:
        """Return the blocks alive and their bytes."""
        return dict(self._blocks)
