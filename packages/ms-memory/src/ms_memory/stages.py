"""What a saved tensor is to the stages of a chain, and what the stages are to the chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Where a tensor was saved, the same in every step.

    Attributes:
        module: dotted path of the innermost module that ran; "" for the root or none.
        call: how many calls of this module came before in this forward of the root.
        index: how many storages this call had saved before.
    """

    module: str = ""
    call: int = 0
    index: int = 0


class Refillable(Protocol):
    """What fills storages that were emptied."""

    def fill(self) -> None:
        """Fill them; nothing where they are full."""

    def adopt(self, holder: Holder) -> None:
        """See who holds such a storage: it may be given another one in place of a copy."""


class Holder:
    """One saved storage, for as long as a graph wants it.

    Attributes:
        tensor: the whole storage, flat, in the dtype of its first save; a placement that holds it
            elsewhere sets None.
        site: where it was first saved.
        forward: number of the forward of the root in which that was.
        nbytes: of the storage when it was saved.
        fixed: it must stay as it is: an input of the model, or another feature owns it.
        state: what stages keep with it, by stage.
    """

    __slots__ = (
        "__weakref__", "coded", "device", "fixed", "forward", "nbytes", "owner", "site", "state",
        "tensor",
    )  # fmt: skip

    def __init__(self, tensor: Tensor, site: Site, forward: int) -> None:
        self.tensor: Tensor | None = tensor
        self.site = site
        self.forward = forward
        self.nbytes = tensor.untyped_storage().nbytes()
        self.device = tensor.device
        self.fixed = False
        self.owner: Refillable | None = None
        self.coded: list[Codec] = []
        self.state: dict[Any, Any] = {}


class Codec(Protocol):
    """A stage that keeps a storage in another form."""

    def encode(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        """Return the other form of a flat tensor; None: it stays as it is."""

    def decode(self, holder: Holder, tensor: Tensor) -> Tensor:
        """Return what `encode` was given."""


class Stage(Protocol):
    """A stage that decides where a storage lies between save and load."""

    def save(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        """See a flat tensor, once a storage; return what the holder keeps, None: the same.

        It may set `holder.tensor` to None later, when it can load it again.
        """

    def load(self, holder: Holder) -> Tensor | None:
        """Return the flat tensor again, as often as asked; None: the holder has it."""


class Watch(Protocol):
    """A stage that only looks."""

    def saved(self, holder: Holder, tensor: Tensor) -> None:
        """See a holder when its storage is first saved."""
