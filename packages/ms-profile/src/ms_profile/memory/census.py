"""Storages followed from birth to death by weak references: exact live bytes at any moment."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Birth", "Held", "Kind", "StorageCensus", "storages", "tensors_of"]

Kind = Literal["parameter", "buffer", "gradient", "optimizer", "input", "activation", "other"]


@dataclass(frozen=True)
class Birth:
    """Where a storage came from.

    Attributes:
        op: the operator that made it, as torch prints it; "" for what existed before.
        module: dotted path of the module that ran, or whose backward ran; "" for none.
        phase: see `ms_profile.tap.phase`; "" for what existed before.
        index: how many operators had been dispatched before; -1 for what existed before.
        shape: of the tensor with which the storage was first seen.
        dtype: of that tensor.
        device: of that tensor.
    """

    op: str
    module: str
    phase: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Held(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a living storage, and what is known of it."""

    __slots__ = ("birth", "counted", "key", "kind", "nbytes")

    birth: tuple[Any, ...]  # fields of Birth, the operator not yet printed: cheap to make
    counted: bool  # among the saved bytes of an earlier backward
    key: int
    kind: Kind
    nbytes: int

    def describe(self) -> Birth:
        """Where it came from."""
        op, module, phase, index, shape, dtype, device = self.birth
        return Birth(str(op), module, phase, index, tuple(shape), dtype, device)


class StorageCensus:
    """The living storages that it was told of, and the sum of their bytes.

    A storage is a Python object for as long as its memory lives, so its `id` names it and a weak
    reference to it calls back at the very moment in which the memory is freed. Sizes that code
    changes through `UntypedStorage.resize_` announce themselves to nobody: `sweep` finds them.

    Attributes:
        nbytes: sum over the living storages.
        held: the living storages by their `id`.
        resized_unseen: how many changes of size `sweep` and `poll` found.
        before_change: called with a storage that is about to die or to change its size.
    """

    def __init__(self, before_change: Callable[[Held], None]) -> None:
        self.nbytes = 0
        self.resized_unseen = 0
        self.before_change = before_change
        self.held: dict[int, Held] = {}
        self._restless: dict[int, Held] = {}

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self.held.values()))

    def __len__(self) -> int:
        return len(self.held)

    def find(self, storage: torch.UntypedStorage) -> Held | None:
        """What is known of a storage; None if it is not followed."""
        return self.held.get(id(storage))

    def add(self, storage: torch.UntypedStorage, kind: Kind, birth: tuple[Any, ...]) -> Held:
        """Follows a storage from now on."""
        held = Held(storage, self._died)
        held.key = id(storage)
        held.kind = kind
        held.birth = birth
        held.counted = False
        held.nbytes = storage.nbytes()
        self.held[held.key] = held
        self.nbytes += held.nbytes
        if held.nbytes == 0:
            self._restless[held.key] = held  # it may be filled later, as sharded weights are
        return held

    def resized(self, held: Held, nbytes: int) -> None:
        """Takes note of a storage's new size."""
        self.before_change(held)
        self.nbytes += nbytes - held.nbytes
        held.nbytes = nbytes

    def sweep(self) -> None:
        """Looks at every storage for sizes that changed unnoticed."""
        for held in self:
            self._look(held)

    def poll(self) -> None:
        """Looks at the storages that have changed unnoticed before."""
        if self._restless:
            for held in list(self._restless.values()):
                self._look(held)

    def stop(self) -> None:
        """No storage calls back any more; `sweep` finds the dead."""
        for held in self:
            storage = held()
            if storage is None:
                continue
            quiet = Held(storage)
            for slot in Held.__slots__:
                setattr(quiet, slot, getattr(held, slot))
            self.held[held.key] = quiet

    def _look(self, held: Held) -> None:
        storage = held()
        if storage is None:
            self._died(held)
        elif (nbytes := storage.nbytes()) != held.nbytes:
            self.resized(held, nbytes)
            self.resized_unseen += 1
            self._restless[held.key] = held

    def _died(self, held: Any) -> None:
        if held.key in self.held:
            self.before_change(held)
            del self.held[held.key]
            self.nbytes -= held.nbytes
            self._restless.pop(held.key, None)


def storages(tensor: Tensor) -> tuple[torch.UntypedStorage, ...]:
    """The storages of a tensor: one, or those of a sparse or wrapping tensor's parts."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:  # by far the most
        try:
            return (tensor.untyped_storage(),)
        except NotImplementedError:
            pass  # sparse: it has parts
    inner = getattr(kind, "__tensor_flatten__", None)
    if inner is not None:
        parts = [getattr(tensor, name) for name in inner(tensor)[0]]
        parts = [part for part in parts if isinstance(part, Tensor)]  # others have none
    elif tensor.layout is torch.strided:
        return (tensor.untyped_storage(),)
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        return ()  # mkldnn: opaque to torch
    return tuple(each for part in parts for each in storages(part))


def tensors_of(items: Any) -> Iterator[Tensor]:
    """The tensors in a nest of modules, tensors, sequences and mappings."""
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, nn.Module):
        for module in items.modules():  # a wrapper may hide `parameters` or `buffers`
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor
    elif isinstance(items, dict):
        for item in items.values():
            yield from tensors_of(item)
    elif isinstance(items, list | tuple | set):
        for item in items:
            yield from tensors_of(item)
