"""Where the tensors of one call live, and what that place can do."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on `dtype` runs in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """Return `x` in its compute dtype; fp32 and fp64 tensors are returned as they are."""
    return x.float() if x.dtype in LOW_PRECISION else x


def common_device(op: str, *tensors: Tensor | None) -> torch.device:
    """Return the one device of all tensors of a call.

    Raises:
        RuntimeError: two tensors live on different devices.
    """
    present = [t for t in tensors if t is not None]
    first = present[0].device
    for tensor in present[1:]:
        if tensor.device != first:
            raise RuntimeError(
                f"{op}: device: got {first} and {tensor.device}, need all tensors on one device"
            )
    return first


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that an active autocast region asks for, None outside of one."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
