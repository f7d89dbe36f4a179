"""This rank's part of tensors that are divided among ranks: DTensors, as FSDP2 makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Its module takes a second to import, and a tensor of it brings it along.
    return hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh")


@torch.no_grad()
def divided_as(part: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor around this rank's part of it, in the same memory.

    Args:
        part: of the shape of `local(like)`, any dtype, on the device of `like` or on the host.
        like: says how it is divided; with an ordinary tensor `part` is returned.
    """
    if not is_divided(like):
        return part
    divided: Any = like.detach()
    if part.device.type == divided.device_mesh.device_type:
        found: Tensor = type(divided).from_local(
            part,
            divided.device_mesh,
            divided.placements,
            run_check=False,
            shape=divided.shape,
            stride=divided.stride(),
        )
        return found
    # `from_local` would move the part to the device of the mesh.
    shell = torch.empty_like(divided, dtype=part.dtype, device=part.device)
    local(shell).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())
    return shell


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one size are the same bytes."""
    return one.device == other.device and one.data_ptr() == other.data_ptr()
