"""A call whose saved tensors are dropped, and computed again when the backward asks for them.

The graph of the call is autograd's own: gradients come by the same nodes as without us, so that
`torch.autograd.grad`, repeated backward and gradients of gradients work.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import refuse
from ..stages import Holder
from .replay import Replay


class Slot:
    """Stands in a graph for a saved tensor."""

    __slots__ = ("__weakref__", "dtype", "shape", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.tensor: Tensor | None = None
        self.version = 0


class Shell:
    """An output whose storage was emptied.

    Args:
        tensor: the output.
        place: its place among the outputs.
        shared: several outputs lie in this storage.
    """

    def __init__(self, tensor: Tensor, place: int, shared: bool) -> None:
        self.place = place
        self.storage = tensor.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.shared = shared
        # Weak: the output holds the graph, which holds the region, which holds this.
        self._tensor = weakref.ref(tensor)
        self.holder: Any = None

    def empty(self) -> None:
        """Free the bytes; the tensor keeps its shape."""
        self.storage.resize_(0)

    def refill(self, found: Tensor) -> None:
        """Give the bytes back."""
        fresh = found.untyped_storage()
        if fresh.nbytes() != self.nbytes:
            where = f"a storage of {self.nbytes} bytes came back as {fresh.nbytes()}"
            refuse("E-M03", where, "let the region depend on its arguments alone")
        tensor, holder = self._tensor(), self.holder and self.holder()
        known = (tensor is not None) + (holder is not None)
        if not self.shared and known and _owners(self.storage) == known:
            # Nobody else looks into the storage: no copy.
            if tensor is not None:
                tensor.data = found.detach()
            if holder is not None:
                holder.tensor = torch.empty(0, dtype=found.dtype, device=found.device).set_(fresh)
            return
        self.storage.resize_(self.nbytes)
        self.storage.copy_(fresh)


class _Done(Exception):
    """All that a backward needs has been computed."""


class _Arguments(torch.autograd.Function):
    """A node that does nothing but save tensors, so that outer hooks see them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("the arguments of a region have no gradient of their own")


class Region:
    """One call of a function.

    Args:
        fn: the function.
        replay: of the states that it reads.
        contexts: context managers around its first and its second run.
        early_stop: end the second run with the last tensor that is missing.

    Attributes:
        shells: outputs to fill together with the interior.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        replay: Replay,
        *,
        contexts: tuple[Any, Any] | None = None,
        early_stop: bool = True,
    ) -> None:
        self.shells: list[Shell] = []
        self._fn: Callable[..., Any] | None = fn
        self._replay = replay
        self._contexts = contexts or (contextlib.nullcontext(), contextlib.nullcontext())
        self._early_stop = early_stop
        self._slots: list[Any] = []
        self._holders: list[Any] = []
        self._arguments: Any = None
        self._rest: list[Any] = []  # arguments that are no tensors
        self._places: list[int] = []  # of those that are
        self._keywords: tuple[str, ...] = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; what it saves is dropped."""
        self._keep(args, kwargs)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with self._replay.first(), hooks, self._contexts[0]:
            assert self._fn is not None
            return self._fn(*args, **kwargs)

    @property
    def ready(self) -> bool:
        """Whether the interior has been computed again."""
        return self._fn is None

    def fill(self) -> None:
        """Compute the interior again, and fill the shells; once."""
        if self._fn is None:
            return
        fn, self._fn = self._fn, None
        slots, missing = iter(self._slots), len(self._slots)

        def pack(tensor: Tensor) -> None:
            nonlocal missing
            reference = next(slots, None)
            if reference is None:
                _not_the_same("it saves more tensors than before")
            _fill_slot(reference(), tensor)
            missing -= 1
            if not missing and self._early_stop and not self.shells:
                raise _Done

        try:
            args, kwargs = self._restored()
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, _unreachable)
            with self._replay.again(), torch.enable_grad(), hooks, self._contexts[1]:
                outputs = fn(*args, **kwargs) if missing or self.shells else None
            if missing:
                _not_the_same(f"it saves {missing} tensors fewer than before")
            self._refill(outputs)
        except _Done:
            pass
        finally:
            self._slots, self._arguments, self._rest, self._contexts = [], None, [], (None, None)

    def adopt(self, holder: Holder) -> None:
        """Remember who holds an output for the graph."""
        self._holders.append(weakref.ref(holder))

    def discard(self, outputs: tuple[Any, ...]) -> None:
        """Empty the storages of the outputs; `fill` fills them again."""
        found: dict[int, list[int]] = {}
        for place, out in enumerate(outputs):
            if isinstance(out, Tensor):
                found.setdefault(id(out.untyped_storage()), []).append(place)
        # All shells first: one that is empty already has no size.
        self.shells = [Shell(outputs[p[0]], p[0], len(p) > 1) for p in found.values()]
        for shell in self.shells:
            for reference in self._holders:
                holder = reference()
                if holder is not None and holder.tensor.untyped_storage() is shell.storage:
                    shell.holder = reference
            shell.empty()

    def _refill(self, outputs: Any) -> None:
        shells, self.shells = self.shells, []
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        for shell in shells:
            shell.refill(found[shell.place])

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments: tensors by a node, so that outer hooks may move them."""
        flat = [*args, *kwargs.values()]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        self._keywords = tuple(kwargs)
        self._rest = [None if isinstance(a, Tensor) else a for a in flat]
        self._places = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
        anchor = torch.empty(0, requires_grad=True)
        self._arguments = _Arguments.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]

    def _restored(self) -> tuple[list[Any], dict[str, Any]]:
        flat = list(self._rest)
        for place, tensor in zip(self._places, self._arguments.saved_tensors, strict=True):
            flat[place] = tensor.detach().requires_grad_(tensor.requires_grad)
        count = len(flat) - len(self._keywords)
        return flat[:count], dict(zip(self._keywords, flat[count:], strict=True))

    def _pack(self, tensor: Tensor) -> Slot:
        slot = Slot(tensor)
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: Slot) -> Tensor:
        if slot.tensor is None:
            self.fill()
        if slot.tensor is None:
            where = "a region whose second run failed or is running"
            refuse("E-M03", where, "let the first error end the step")
        if slot.tensor._version != slot.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an"
                " inplace operation inside a region that is computed again"
            )
        return slot.tensor


def _fill_slot(slot: Slot | None, tensor: Tensor) -> None:
    if slot is None:
        return  # its graph is gone
    if (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):
        _not_the_same(
            f"a saved tensor was {slot.dtype} {list(slot.shape)} and is now"
            f" {tensor.dtype} {list(tensor.shape)}"
        )
    slot.tensor, slot.version = tensor.detach(), tensor._version


def _not_the_same(what: str) -> NoReturn:
    refuse(
        "E-M03",
        f"the second run of a region differs from the first: {what}",
        "let it depend on its arguments alone, and register the generators it draws from",
    )


def _unreachable(_: Any) -> Tensor:
    raise AssertionError("nobody differentiates the second run")


def _owners(storage: torch.UntypedStorage) -> int:
    """Return how many tensors own a storage; a large number where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 1 << 30 if count is None else int(count(storage._cdata)) - 1
