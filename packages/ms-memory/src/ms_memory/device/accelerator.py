"""GPUs and NPUs: streams and events of torch's device modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .protocol import DeviceStats, Event, Pair


class AcceleratorEvent:
    """An event of a torch device module."""

    def __init__(self, api: Any, event: Any) -> None:
        self._api = api
        self.event = event

    def wait(self) -> None:
        """Let the current stream come after it."""
        self._api.current_stream().wait_event(self.event)

    def done(self) -> bool:
        """Whether it has passed."""
        return bool(self.event.query())

    def synchronize(self) -> None:
        """Hold the program until it has passed."""
        self.event.synchronize()


class AcceleratorStream:
    """A side stream for copies of one direction."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._stream = api.Stream()

    def wait(self, event: Event) -> None:
        """Let the copies from here on come after an event."""
        assert isinstance(event, AcceleratorEvent)
        self._stream.wait_event(event.event)

    def copy(self, pairs: Sequence[Pair]) -> AcceleratorEvent:
        """Queue copies; the event follows them."""
        with torch.no_grad(), self._api.stream(self._stream):
            for dst, src in pairs:
                dst.copy_(src, non_blocking=True)
        event = self._api.Event()
        event.record(self._stream)
        return AcceleratorEvent(self._api, event)


class Accelerator:
    """A device that torch has a module for (`torch.cuda`, `torch.npu`).

    Args:
        kind: its device type.
        api: the module; None: torch's own for this type.
    """

    def __init__(self, kind: str, api: Any = None) -> None:
        self.name = kind
        self._api = torch.get_device_module(kind) if api is None else api
        self._streams: dict[str, AcceleratorStream] = {}
        self._pinned = 0

    @property
    def d2h(self) -> AcceleratorStream:
        """Its copies to the host."""
        return self._stream("d2h")

    @property
    def h2d(self) -> AcceleratorStream:
        """Its copies from the host."""
        return self._stream("h2d")

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on it."""
        return tensor.device.type == self.name

    def record(self) -> AcceleratorEvent:
        """Return an event on the current stream."""
        event = self._api.Event()
        event.record(self._api.current_stream())
        return AcceleratorEvent(self._api, event)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an unset tensor on it, contiguous, of a shape and dtype."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.name)

    def pinned(self, nbytes: int) -> Tensor:
        """Return pinned host memory, uint8 [nbytes]."""
        self._pinned += nbytes
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def unused(self, host: Tensor) -> None:
        """Nothing: memory keeps its contents."""

    def empty_storage(self, tensor: Tensor) -> None:
        """Give a tensor's bytes back to the allocator."""
        tensor.untyped_storage().resize_(0)

    def restore_storage(self, tensor: Tensor, nbytes: int) -> None:
        """Give an emptied tensor its bytes again, unset."""
        tensor.untyped_storage().resize_(nbytes)

    def stats(self) -> DeviceStats:
        """Return what torch's allocator counts."""
        allocated = self._api.memory_allocated()
        return DeviceStats(allocated, self._api.max_memory_allocated(), self._pinned)

    def _stream(self, name: str) -> AcceleratorStream:
        # Made at first use, so that a session that copies nothing starts no device.
        if name not in self._streams:
            self._streams[name] = AcceleratorStream(self._api)
        return self._streams[name]
