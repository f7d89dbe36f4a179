"""Host memory for copies, kept for the next step and bounded."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import Device, Event
from ..errors import refuse
from ..ledger.host import HostLedger

PAGE = 4096
# Sizes are rounded up to an eighth of a power of two: at most 1/8 is lost, and tensors whose sizes
# vary a little from step to step find each other's blocks.
STEPS = 8


@dataclass(frozen=True, eq=False)
class Block:
    """Host memory on loan.

    Attributes:
        memory: uint8 [size of its class].
        nbytes: what was asked for.
    """

    memory: Tensor
    nbytes: int

    def view(self, like: Tensor) -> Tensor:
        """Return its beginning as a flat tensor of another's dtype and element count."""
        return self.memory[: self.nbytes].view(like.dtype)


def size_class(nbytes: int) -> int:
    """Return the size of the block that serves a request, bytes."""
    step = max(PAGE, 1 << max(0, (nbytes - 1).bit_length() - STEPS.bit_length()))
    return -(-nbytes // step) * step


class HostPool:
    """Blocks of host memory by size class, reused once their last copy has run.

    Args:
        device: whose copy engines reach it.
        nbytes: cap on all blocks together; None: none.
        pin: pinned memory; without, copies to and from an accelerator hold the program.
        ledger: counts what is on loan; None: one of its own.

    Attributes:
        ledger: the balance of bytes on loan, as they were asked for.
        held: bytes of all blocks, as they were allocated.
    """

    def __init__(
        self,
        device: Device,
        nbytes: int | None = None,
        *,
        pin: bool = True,
        ledger: HostLedger | None = None,
    ) -> None:
        self.device = device
        self.cap = nbytes
        self.pin = pin
        self.ledger = HostLedger() if ledger is None else ledger
        self.held = 0
        self._free: dict[int, deque[tuple[Tensor, Event | None]]] = defaultdict(deque)

    def take(self, nbytes: int) -> Block:
        """Borrow host memory.

        Raises:
            MemoryFeatureError: E-M32, the cap is exceeded.
        """
        size = size_class(nbytes)
        memory = self._reuse(size)
        if memory is None:
            memory = self._allocate(size, nbytes)
        try:
            self.ledger.take(nbytes)
        except ValueError:
            self._free[size].append((memory, None))
            raise
        return Block(memory, nbytes)

    def give(self, block: Block, after: Event | None = None) -> None:
        """Return a block; it is lent again once an event has passed."""
        self.ledger.give(block.nbytes)
        self._free[block.memory.numel()].append((block.memory, after))

    def clear(self) -> None:
        """Give all memory back that is not on loan."""
        for size, blocks in self._free.items():
            for _, event in blocks:
                if event is not None:
                    event.synchronize()
            self.held -= size * len(blocks)
        self._free.clear()

    def _reuse(self, size: int) -> Tensor | None:
        waiting = self._free[size]
        for index, (memory, event) in enumerate(waiting):
            if event is None or event.done():
                del waiting[index]
                self.device.unused(memory)
                return memory
        if waiting and self._full(size):
            memory, event = waiting.popleft()
            assert event is not None
            event.synchronize()
            self.device.unused(memory)
            return memory
        return None

    def _allocate(self, size: int, nbytes: int) -> Tensor:
        if self._full(size):
            self.clear()
        if self._full(size):
            refuse(
                "E-M32",
                f"{self.ledger.nbytes} bytes are out, {nbytes} more exceed {self.cap}",
                "raise host_bytes, or swap fewer layers",
            )
        self.held += size
        return self.device.pinned(size) if self.pin else torch.empty(size, dtype=torch.uint8)

    def _full(self, size: int) -> bool:
        return self.cap is not None and self.held + size > self.cap
