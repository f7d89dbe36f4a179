"""Other forms in which a saved storage is kept; every one gives back the same bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .stages import Holder

# The same operation under its newer name, where torch has it.
_all_gather_flat: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Identity:
    """Keeps a storage as it is."""

    def encode(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        """Return None: as it is."""
        return None

    def decode(self, holder: Holder, tensor: Tensor) -> Tensor:
        """Return what it is given."""
        return tensor


class ShardAcross:
    """Keeps one of n equal parts on each rank of a group; all of them meet again in backward.

    For storages that are the same on all ranks of the group, as activations outside tensor-parallel
    regions are without sequence parallelism. Each rank keeps ceil(nbytes / n) bytes and receives
    the rest in one all-gather for each use in backward. Ranks must save and use the same storages
    in the same order.

    Args:
        group: the ranks.
        min_bytes: smaller storages stay whole; the same number on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, min_bytes: int = 0) -> None:
        self.group = group
        self.min_bytes = min_bytes
        self._size = group.size()
        self._rank = group.rank()

    def encode(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        """Return this rank's part of a flat tensor, uint8 [ceil(nbytes / n)], padded."""
        content = tensor.view(torch.uint8)
        if self._size == 1 or content.numel() < max(1, self.min_bytes):
            return None
        length = -(-content.numel() // self._size)
        # Zeros, so that what pads the last part is no secret of the allocator.
        part = torch.zeros(length, dtype=torch.uint8, device=tensor.device)
        mine = content[self._rank * length : (self._rank + 1) * length]
        part[: mine.numel()].copy_(mine)
        holder.state[self] = tensor.dtype, content.numel()
        return part

    def decode(self, holder: Holder, tensor: Tensor) -> Tensor:
        """Return the flat tensor that was encoded."""
        kept: tuple[Any, int] = holder.state[self]
        dtype, nbytes = kept
        length = tensor.numel()
        whole = torch.empty(self._size * length, dtype=torch.uint8, device=tensor.device)
        _all_gather_flat(whole, tensor, group=self.group)
        return whole[:nbytes].view(dtype)
