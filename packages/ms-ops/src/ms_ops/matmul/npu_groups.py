"""What torch_npu's grouped products take."""

from __future__ import annotations

import torch
from torch import Tensor

# At most: groups, and the last dimension of each operand.
GROUPS, WIDTH = 1024, 65535


def serves(x: Tensor, matrices: Tensor, offsets: Tensor) -> bool:
    """Whether the kernel takes these sizes; a list of one group is for the caller to see to."""
    sizes = (x.shape[1], matrices.shape[2])
    fits = offsets.shape[0] <= GROUPS and max(sizes) <= WIDTH
    return fits and 0 not in (x.numel(), matrices.numel())


def ends_on(offsets: Tensor, like: Tensor) -> Tensor:
    """Return the ends of the groups as the kernel reads them."""
    return offsets.to(like.device, torch.int64, non_blocking=True)
