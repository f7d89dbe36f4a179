"""What autograd saves, by storage."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..stages import Holder, Site


@dataclass(frozen=True)
class Saved:
    """One storage that a graph wants.

    Attributes:
        site: where it was first saved.
        nbytes: when it was saved.
        dtype: of the tensor that was saved first.
        device: where it was then.
        fixed: it is an input of the model, or a feature empties and fills it.
    """

    site: Site
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    fixed: bool
    _holder: Any = field(repr=False, compare=False)
    _storage: Any = field(repr=False, compare=False)

    @property
    def live_bytes(self) -> int:
        """Bytes now: 0 when its graph is gone, its storage freed, moved or emptied."""
        storage = self._storage()
        return 0 if self._holder() is None or storage is None else int(storage.nbytes())


class SavedLedger:
    """Counts what passes saved-tensor hooks, each storage once.

    Within `with SavedLedger(exclude=model) as ledger:` it watches a chain of its own; a session
    has one in its own chain. What a checkpoint region saves inside and what a function keeps as an
    attribute of its context passes no hook: see `StorageCensus`.

    Args:
        exclude: a module, whose parameters and buffers do not count, or tensors.

    Attributes:
        entries: in the order of their saves.
    """

    def __init__(self, exclude: nn.Module | Iterable[Tensor] = ()) -> None:
        self.entries: list[Saved] = []
        self._exclude = state_of(exclude) if isinstance(exclude, nn.Module) else list(exclude)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SavedLedger:
        chain = Chain()
        chain.exclude(self._exclude)
        chain.watch(self)
        self._stack.enter_context(chain.hooks())
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def saved(self, holder: Holder, tensor: Tensor) -> None:
        """See a storage when it is saved first."""
        refs = weakref.ref(holder), weakref.ref(tensor.untyped_storage())
        entry = Saved(holder.site, holder.nbytes, tensor.dtype, holder.device, holder.fixed, *refs)
        self.entries.append(entry)

    @property
    def nbytes(self) -> int:
        """Bytes when they were saved."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def live_bytes(self) -> int:
        """Bytes that graphs keep on the device now."""
        return sum(entry.live_bytes for entry in self.entries)

    def by_module(self) -> dict[str, int]:
        """Return the bytes when saved, by path of the module that saved first."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.site.module] = found.get(entry.site.module, 0) + entry.nbytes
        return found

    def clear(self) -> None:
        """Forget all entries."""
        self.entries.clear()


def state_of(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
