"""What swapping needs of a device: two copy engines, events between them, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Destination and source of a copy, of one shape and dtype.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DeviceStats:
    """Bytes of a device that are known to it.

    Attributes:
        allocated: now.
        peak: the most so far.
        pinned: host memory that was pinned for it so far.
    """

    allocated: int
    peak: int
    pinned: int


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Let what the program computes from here on come after this point."""

    def done(self) -> bool:
        """Whether the stream has passed this point; never waits."""

    def synchronize(self) -> None:
        """Hold the program until the stream has passed this point."""


class Stream(Protocol):
    """A copy engine: its copies run one after another, beside what the device computes."""

    def wait(self, event: Event) -> None:
        """Let the copies from here on come after an event."""

    def copy(self, pairs: Sequence[Pair]) -> Event:
        """Queue copies; the event follows them.

        Both tensors of a pair must stay alive until something that waited on the event ran.
        """


class Device(Protocol):
    """A device that tensors can leave for the host.

    Attributes:
        name: of its kind.
        d2h: its copies to the host.
        h2d: its copies from the host.
    """

    name: str

    @property
    def d2h(self) -> Stream:
        """Its copies to the host."""

    @property
    def h2d(self) -> Stream:
        """Its copies from the host."""

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on this device."""

    def record(self) -> Event:
        """Return an event after all that the program computed so far."""

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an unset tensor on the device, contiguous, of a shape and dtype."""

    def pinned(self, nbytes: int) -> Tensor:
        """Return unset host memory that the copy engines can reach, uint8 [nbytes]."""

    def unused(self, host: Tensor) -> None:
        """Say that nobody wants the contents of host memory any more."""

    def empty_storage(self, tensor: Tensor) -> None:
        """Give back a tensor's bytes; the tensor itself stays."""

    def restore_storage(self, tensor: Tensor, nbytes: int) -> None:
        """Give an emptied tensor its bytes again, unset."""

    def stats(self) -> DeviceStats:
        """Return its bytes."""
