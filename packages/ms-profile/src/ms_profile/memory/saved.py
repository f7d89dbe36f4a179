"""Bytes that autograd keeps for the backward pass, counted exactly.

    with saved_bytes(exclude=model) as meter:
        loss = model(x).sum()
    meter.total      # bytes of the distinct storages that were saved
    meter.live       # bytes of those still alive now
    meter.peak       # most bytes alive at one time

A storage counts once, whole, however many views of it were saved. Parameters are never counted.
Nothing of torch is changed: outside the context no code of this module runs.

Limits, all of `torch.autograd.graph.saved_tensors_hooks`, on which this is built:

- tensors kept as plain attributes of an autograd context are not seen;
- a non-reentrant checkpoint shows only its inputs until it recomputes;
- code that installs saved-tensor hooks of its own inside the context hides its tensors;
- a custom backward gets saved parameters without their Python attributes, so do not meter a step
  whose backward reads or sets such attributes (fused gradient accumulation does), unless its
  gradients are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["SavedBytes", "saved_bytes"]


class SavedBytes:
    """The running count of one `saved_bytes` context; still readable after it."""

    def __init__(self, excluded: set[int]) -> None:
        self._excluded = excluded
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sweep_before_adding = False
        self._total = 0
        self._live = 0
        self._peak = 0
        self._count = 0

    @property
    def total(self) -> int:
        """Bytes of all distinct storages saved so far."""
        return self._total

    @property
    def peak(self) -> int:
        """Most saved bytes alive at one time, judged whenever a tensor is saved."""
        return self._peak

    @property
    def live(self) -> int:
        """Saved bytes still alive now."""
        self._sweep()
        return self._live

    @property
    def count(self) -> int:
        """How many distinct storages were saved so far."""
        return self._count

    def _add(self, tensor: Tensor) -> None:
        if _is_parameter(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._excluded:
            return
        if self._sweep_before_adding:
            self._sweep()
        if key in self._storages:
            return
        # The weak reference keeps the address from being used again, so the key stays unique.
        size = storage.nbytes()
        self._storages[key] = StorageWeakRef(storage), size
        self._count += 1
        self._total += size
        self._live += size
        self._peak = max(self._peak, self._live)

    def _released_some(self) -> None:
        # Autograd frees a node's tensors after reading them: only then can anything have expired.
        self._sweep_before_adding = True

    def _sweep(self) -> None:
        self._sweep_before_adding = False
        gone = [key for key, (weak, _) in self._storages.items() if weak.expired()]
        for key in gone:
            self._live -= self._storages.pop(key)[1]


_meters: ContextVar[tuple[SavedBytes, ...]] = ContextVar("ms_profile_saved_bytes", default=())


@contextmanager
def saved_bytes(
    exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor] = (),
) -> Iterator[SavedBytes]:
    """Counts what autograd saves inside the context.

    Contexts nest: an outer one also counts what an inner one sees.

    Args:
        exclude: modules whose parameters and buffers, and tensors whose storages, are not counted:
            buffers and the inputs of the model, typically.

    Yields:
        The meter; read it during or after the context.
    """
    if isinstance(exclude, nn.Module | Tensor):
        exclude = (exclude,)
    meter = SavedBytes({t.untyped_storage()._cdata for t in _tensors(exclude)})
    active = (*_meters.get(), meter)
    token = _meters.set(active)

    def pack(tensor: Tensor) -> Tensor:
        for each in active:
            each._add(tensor)
        # A node that holds its own output with its history would never be freed.
        return tensor if tensor.is_leaf else tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        for each in active:
            each._released_some()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield meter
    finally:
        _meters.reset(token)


def _tensors(items: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for item in items:
        if isinstance(item, nn.Module):
            yield from item.parameters()
            yield from item.buffers()
        else:
            yield item


def _is_parameter(tensor: Tensor) -> bool:
    """A parameter or a view of one, such as the transposed weight that a matmul saves."""
    base = tensor._base
    return isinstance(tensor if base is None else base, nn.Parameter)
