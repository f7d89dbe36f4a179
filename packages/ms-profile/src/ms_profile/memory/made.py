"""What an operator made: results whose storage is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ms_profile.memory.census import StorageCensus, storages, tensors_of

__all__ = ["Made", "is_on", "made_by"]

Made = tuple[Tensor, torch.UntypedStorage]

# torch.tensor makes its result unseen and then passes it through this operator.
_LIFT = torch.ops.aten.lift_fresh.default


def made_by(
    census: StorageCensus,
    func: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Any,
    device: torch.device | None,
) -> Sequence[Made]:
    """The new storages among an operator's results, each once, with a tensor that shows it.

    A result whose storage is unknown and came with no argument is new. The census hears of the
    new sizes of those that it knows.

    Args:
        census: what is known.
        func: the operator.
        args: its positional arguments.
        kwargs: its named arguments.
        out: its result.
        device: see `is_on`.
    """
    found: dict[int, Made] = {}
    for tensor in (out,) if isinstance(out, Tensor) else tensors_of(out):
        if not is_on(tensor, device):
            continue
        for storage in storages(tensor):
            held = census.held.get(id(storage))
            if held is not None:
                if held.nbytes != (nbytes := storage.nbytes()):
                    census.resized(held, nbytes)
            elif func is _LIFT or not _among(storage, args, kwargs):
                found[id(storage)] = tensor, storage
    return list(found.values()) if found else ()


def is_on(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether a tensor is on a device, on any of its type if it has no number; on any if None."""
    if device is None:
        return True
    place = tensor.device
    return place.type == device.type and device.index in (None, place.index)


def _among(storage: torch.UntypedStorage, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the operator got the storage, by itself or in a tensor."""
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, Tensor):
            for each in storages(arg):
                if each is storage:
                    return True
        elif isinstance(arg, (list, tuple)):
            if _among(storage, tuple(tensors_of(arg)), {}):
                return True
        elif arg is storage:
            return True
    return False
