"""The processor: its tensors have nowhere else to go."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .protocol import DeviceStats


class Cpu:
    """A device whose memory is the host's: whatever would copy is refused.

    Raises:
        RuntimeError: from `d2h`, `h2d` and `pinned`.
    """

    name = "cpu"

    @property
    def d2h(self) -> NoReturn:
        """Refused."""
        _refuse_copy()

    @property
    def h2d(self) -> NoReturn:
        """Refused."""
        _refuse_copy()

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on it."""
        return tensor.device.type == "cpu"

    def record(self) -> NoReturn:
        """Refused."""
        _refuse_copy()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return an unset tensor, contiguous, of a shape and dtype."""
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def pinned(self, nbytes: int) -> NoReturn:
        """Refused."""
        _refuse_copy()

    def unused(self, host: Tensor) -> None:
        """Nothing: memory keeps its contents."""

    def empty_storage(self, tensor: Tensor) -> None:
        """Give a tensor's bytes back."""
        tensor.untyped_storage().resize_(0)

    def restore_storage(self, tensor: Tensor, nbytes: int) -> None:
        """Give an emptied tensor its bytes again, unset."""
        tensor.untyped_storage().resize_(nbytes)

    def stats(self) -> DeviceStats:
        """Return zeros: torch does not count the processor's memory."""
        return DeviceStats(0, 0, 0)


def _refuse_copy() -> NoReturn:
    raise RuntimeError(
        "device 'cpu': a copy to the host frees nothing here; use an accelerator, or to run the"
        " same code in tests ms_memory.device.sim(), or MS_MEMORY_SIM=late in the environment"
    )
