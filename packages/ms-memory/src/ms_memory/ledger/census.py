"""Every storage that operators make, until it dies."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCensus(TorchDispatchMode):
    """The storages made within, and their bytes after every operator.

    It sees what hooks do not: attributes of contexts, the interior of checkpoints, leaks. It is an
    oracle: each operator costs a look at every living storage, because a storage whose size is
    changed in place tells nobody.

    Args:
        track: tensors that existed before and count.
        where: type of the device whose storages count; None: all.

    Attributes:
        nbytes: alive after the last operator, mark or `sweep`.
        peak: the largest so far.
        marks: bytes at each `mark`, by name.
    """

    def __init__(self, track: Iterable[Tensor] = (), where: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self.peak = 0
        self.marks: dict[str, int] = {}
        self._where = where
        self._held: dict[int, Any] = {}
        for tensor in track:
            self._see(tensor)
        self.sweep()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it returns."""
        out = func(*args, **(kwargs or {}))
        made = _tensors(out)
        if made:
            given = set(map(id, _storages((args, kwargs))))
            for tensor in made:
                if id(tensor.untyped_storage()) not in given:  # a view of what existed before
                    self._see(tensor)
        self.sweep()
        return out

    def sweep(self) -> int:
        """Count again; returns the bytes alive."""
        total = 0
        for reference in list(self._held.values()):
            storage = reference()
            if storage is not None:
                total += storage.nbytes()
        self.nbytes = total
        self.peak = max(self.peak, self.nbytes)
        return self.nbytes

    def mark(self, name: str) -> int:
        """Note the bytes alive under a name; returns them."""
        self.marks[name] = self.sweep()
        return self.nbytes

    def reset_peak(self) -> None:
        """Let the peak start from what is alive."""
        self.peak = 0
        self.sweep()

    def _see(self, tensor: Tensor) -> None:
        if self._where is not None and tensor.device.type != self._where:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._held:
            held = self._held
            held[key] = weakref.ref(storage, lambda _: held.pop(key, None))


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return what exists before an operator: a storage that it is given was not made by it."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.UntypedStorage):
            found.append(leaf)
        elif isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            found.append(leaf.untyped_storage())
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.layout is torch.strided]
