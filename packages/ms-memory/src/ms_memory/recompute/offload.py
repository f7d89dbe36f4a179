"""Results of operators that a selective policy wants on the host: they go there, and come back.

Eager torch takes the policy `MUST_CPU_OFFLOAD` and computes such an operator again. Here its result
is copied out behind the forward, and the second run of the region takes it from there.

Torch's own pair of dispatch modes decides what is saved; a mode outside of each sees the operators
that really run. In the first run it hands over their results, in the second it answers in their
place.
"""

from __future__ import annotations

import enum
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..stages import Holder, Site
from ..swap.modules import install
from ..swap.prefetch import Prefetcher

if TYPE_CHECKING:
    from ..session import Session

Policy = Callable[..., Any]
_TORCH = torch_checkpoint.CheckpointPolicy
_SAVE = (_TORCH.MUST_SAVE, _TORCH.PREFER_SAVE, True)


class _Offload(enum.Enum):
    """For a torch whose own policies lack it."""

    MUST_CPU_OFFLOAD = "must offload"


# What a policy answers for a result that shall wait on the host: torch's own where it has it.
MUST_CPU_OFFLOAD: Any = getattr(_TORCH, "MUST_CPU_OFFLOAD", _Offload.MUST_CPU_OFFLOAD)
_OFFLOAD = (MUST_CPU_OFFLOAD, getattr(_TORCH, "PREFER_CPU_OFFLOAD", MUST_CPU_OFFLOAD))


class Offloading:
    """What moves the results of one session's regions.

    Args:
        session: whose model.
        names: of the regions.
    """

    def __init__(self, session: Session, names: list[str]) -> None:
        self._chain = session.chain
        self._device = session.device
        self._swap: Prefetcher | None = None
        if self._device.name != "cpu":
            self._swap = install(
                session, names, lambda holder, _: holder.state.get(self)
            ).prefetcher

    def contexts(self, policy: Policy, region: str) -> tuple[Any, Any]:
        """Return what stands around the two runs of a region."""
        kept = _Kept(policy)
        make = torch_checkpoint.create_selective_checkpoint_contexts
        first, second = make(kept.answer)  # type: ignore[no-untyped-call]
        return _Both(_First(self, kept, region), first), _Both(_Second(kept), second)

    def out(self, tensor: Tensor, region: str) -> _Parked:
        """Start a result's way to the host.

        Raises:
            RuntimeError: the model is on the processor.
        """
        if self._swap is None:
            self._device.d2h  # noqa: B018  refuses
        assert self._swap is not None
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        flat.set_(tensor.untyped_storage())
        holder = Holder(flat, Site(region), self._chain.forward)
        holder.state[self] = region
        self._swap.save(holder, flat)
        return _Parked(self._swap, holder, tensor)


class _Parked:
    """A result on the host."""

    def __init__(self, swap: Prefetcher, holder: Holder, tensor: Tensor) -> None:
        self._swap, self._holder = swap, holder
        self._layout = tensor.storage_offset(), tensor.size(), tensor.stride()
        self._written = weakref.ref(tensor), tensor._version

    def back(self) -> Tensor:
        """Return it on the device."""
        tensor, version = self._written[0](), self._written[1]
        if tensor is not None and tensor._version != version:
            _written_in_place()
        flat = self._swap.load(self._holder)
        flat = self._holder.tensor if flat is None else flat
        assert flat is not None
        return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(
            flat.untyped_storage(), *self._layout
        )


class _Kept:
    """What the first run of a region hands to its second: results by operator and call.

    Torch asks the policy before an operator runs, or after, by its version. `asked` is an answer
    whose operator is to run; `ran` an operator that ran and its result.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.parked: dict[tuple[Any, int], Any] = {}
        self.storages: set[int] = set()
        self.calls: Counter[Any] = Counter()
        self.asked: Any = None
        self.ran: tuple[Any, Any] | None = None
        self.park: Callable[[Any], Any] = lambda out: out

    def answer(self, ctx: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Ask the policy; to torch, what goes to the host is what runs again."""
        found = self._policy(ctx, func, *args, **kwargs)
        leaves = found in _OFFLOAD
        if not ctx.is_recompute and found not in _SAVE:
            place = func, self.calls[func]
            self.calls[func] += 1
            if leaves and self.ran is not None and self.ran[0] is func:
                self.parked[place] = self.park(self.ran[1])
            elif leaves:
                self.asked = place
        self.ran = None
        return _TORCH.MUST_RECOMPUTE if leaves else found


class _First(TorchDispatchMode):
    """Sees the operators of the first run."""

    def __init__(self, offloading: Offloading, kept: _Kept, region: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._offloading, self._kept, self._region = offloading, kept, region
        self._busy = False
        kept.park = self._park

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._busy:
            return func(*args, **(kwargs or {}))
        kept = self._kept
        if kept.storages and func._schema.is_mutable:
            _check_writes(func, args, kept.storages)
        out = func(*args, **(kwargs or {}))
        if kept.asked is not None:
            place, kept.asked = kept.asked, None
            kept.parked[place] = self._park(out)
        elif func not in torch_checkpoint.SAC_IGNORED_OPS:
            kept.ran = func, out
        return out

    def _park(self, out: Any) -> Any:
        self._busy = True
        try:
            return tree_map(self._one, out)
        finally:
            self._busy = False

    def _one(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        self._kept.storages.add(id(leaf.untyped_storage()))
        return self._offloading.out(leaf, self._region)


class _Second(TorchDispatchMode):
    """Answers in place of the operators whose results are on the host."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in torch_checkpoint.SAC_IGNORED_OPS:
            place = func, self._calls[func]
            self._calls[func] += 1
            if place in self._kept.parked:
                found = self._kept.parked.pop(place)
                return tree_map(lambda x: x.back() if isinstance(x, _Parked) else x, found)
        return func(*args, **(kwargs or {}))


class _Both:
    """Two context managers, the first outside."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._managers = outer, inner
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for manager in self._managers:
            self._stack.enter_context(manager)

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _check_writes(func: Any, args: Any, storages: set[int]) -> None:
    """Refuse to write to what is on its way to the host."""
    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        if any(id(leaf.untyped_storage()) in storages for leaf in leaves):
            _written_in_place()


def _written_in_place() -> None:
    raise RuntimeError(
        "modules: policy: a result that MUST_CPU_OFFLOAD sends to the host has been modified by an"
        " inplace operation; need a result that stays as it is, or another policy for it"
    )
