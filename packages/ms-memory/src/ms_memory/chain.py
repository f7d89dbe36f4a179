"""One pair of saved-tensor hooks, and the stages that a saved tensor passes in it.

Torch calls only the innermost pair of `saved_tensors_hooks`, so that two features with a pair each
would not both act. Here one `Chain` owns the pair, and features are stages of it:

    save: filter -> ledger -> codecs -> placement
    load: placement -> codecs, backwards -> the view that was saved

Views of one storage share one `Holder`, so that its bytes are counted, coded and moved once.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .stages import Codec, Holder, Refillable, Site, Stage, Watch


class Writes:
    """Notices writes to a tensor after it was saved: torch leaves that to whoever has hooks.

    Args:
        tensor: which is saved now.
    """

    __slots__ = ("_counter", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # An alias shares the counter of writes; without a storage of its own it keeps no bytes.
        self._counter = tensor.detach()
        self._counter.data = tensor.new_empty(0)
        self._version = tensor._version

    def check(self) -> None:
        """Raise what torch raises for a tensor that was written.

        Raises:
            RuntimeError: it was.
        """
        if self._counter._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an"
                f" inplace operation: it is at version {self._counter._version}; expected"
                f" version {self._version} instead"
            )


class _View:
    """What a graph keeps in place of a saved tensor."""

    __slots__ = ("dtype", "holder", "offset", "size", "stride", "written")

    def __init__(self, holder: Holder, tensor: Tensor) -> None:
        self.holder = holder
        self.dtype = tensor.dtype
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.written = Writes(tensor)


class _Entered(threading.local):
    """The chains whose hooks this thread is within, outermost first."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []


_entered = _Entered()


class Chain:
    """The stages, and the pair of hooks that runs them.

    Attributes:
        watches: stages that look, called first.
        codecs: stages that code, in order.
        placements: stages that place; the first that returns something decides.
        site: returns where the program is now.
        forward: number of the current forward.
    """

    def __init__(self, site: Callable[[], Site] = Site) -> None:
        self.watches: list[Watch] = []
        self.codecs: list[Codec] = []
        self.placements: list[Stage] = []
        self.site = site
        self.forward = 0
        self.listening = self.heard = False  # see `probed_hooks`
        self._holders: dict[int, tuple[Any, Any]] = {}
        self._claims: dict[int, tuple[Any, Any]] = {}
        self._excluded: dict[int, Any] = {}
        self._fixed: dict[int, Any] = {}

    def place(self, stage: Stage) -> Callable[[], None]:
        """Add a placement; returns what removes it."""
        self.placements.append(stage)
        return lambda: self.placements.remove(stage)

    def code(self, codec: Codec) -> Callable[[], None]:
        """Add a codec; returns what removes it."""
        self.codecs.append(codec)
        return lambda: self.codecs.remove(codec)

    def watch(self, stage: Watch) -> Callable[[], None]:
        """Add a stage that looks; returns what removes it."""
        self.watches.append(stage)
        return lambda: self.watches.remove(stage)

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Let the storages of tensors pass unseen, in place of those excluded before."""
        self._excluded = _by_storage(tensors)

    def fix(self, tensors: Iterable[Tensor]) -> None:
        """Let no codec or placement touch these storages, in place of those fixed before."""
        self._fixed = _by_storage(tensors)

    def claim(self, storage: torch.UntypedStorage, owner: Refillable) -> None:
        """Say who may empty a storage: it stays in place, and its owner is asked to fill it."""
        key = id(storage)
        gone = weakref.ref(storage, lambda _: self._claims.pop(key, None))
        self._claims[key] = gone, weakref.ref(owner)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Within, what autograd saves passes the stages."""
        _entered.chains.append(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, self._load):
                yield
        finally:
            _entered.chains.pop()

    def _save(self, tensor: Tensor) -> Any:
        if self.listening:
            self.heard = True
            return tensor
        if not _plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if _known(self._excluded, storage):
            return tensor
        holder = self._holder(storage)
        if holder is None:
            with torch.no_grad():
                holder = self._new_holder(tensor, storage)
        return _View(holder, tensor)

    def _holder(self, storage: torch.UntypedStorage) -> Holder | None:
        found = self._holders.get(id(storage))
        if found is None or found[0]() is not storage:
            return None
        holder: Holder | None = found[1]()
        return holder

    def _new_holder(self, tensor: Tensor, storage: torch.UntypedStorage) -> Holder:
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        flat.set_(storage)
        holder = Holder(flat, self.site(), self.forward)
        key = id(storage)
        gone = weakref.ref(storage, lambda _: self._holders.pop(key, None))
        self._holders[key] = gone, weakref.ref(holder)
        claim = self._claims.get(key)
        if claim is not None and claim[0]() is storage:
            holder.owner = claim[1]()
            if holder.owner is not None:
                holder.owner.adopt(holder)
        holder.fixed = holder.owner is not None or _known(self._fixed, storage)
        for watch in self.watches:
            watch.saved(holder, flat)
        if not holder.fixed:
            self._put(holder, flat)
        return holder

    def _put(self, holder: Holder, flat: Tensor) -> None:
        for codec in self.codecs:
            coded = codec.encode(holder, flat)
            if coded is not None:
                holder.coded.append(codec)
                holder.tensor = flat = coded
        for stage in self.placements:
            kept = stage.save(holder, flat)
            if kept is not None:
                holder.tensor = kept
                break

    def _load(self, packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            assert isinstance(packed, Tensor)
            return packed
        packed.written.check()
        with torch.no_grad():
            flat = self._fetch(packed.holder)
            found = torch.empty(0, dtype=packed.dtype, device=flat.device)
            found.set_(flat.untyped_storage(), packed.offset, packed.size, packed.stride)
            return found

    def _fetch(self, holder: Holder) -> Tensor:
        kept = holder.tensor
        if holder.owner is not None and kept is not None and not kept.untyped_storage().nbytes():
            holder.owner.fill()
        flat = None
        for stage in self.placements:
            flat = stage.load(holder)
            if flat is not None:
                break
        flat = holder.tensor if flat is None else flat
        assert flat is not None
        for codec in reversed(holder.coded):
            flat = codec.decode(holder, flat)
        return flat


def top_hooks() -> tuple[Any, ...] | None:
    """Return the innermost pair of saved-tensor hooks, None where there is none."""
    read = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    found: tuple[Any, ...] | None = probed_hooks() if read is None else read(True)
    return found


def probed_hooks() -> tuple[Any, ...] | None:
    """Return the same where torch does not tell (before 2.8): save a tensor and see who gets it.

    Hooks that are no chain's are (None, None).
    """
    for chain in _entered.chains:
        chain.heard, chain.listening = False, True
    try:
        with torch.enable_grad():
            node: Any = torch.ones((), requires_grad=True).sin().grad_fn
    finally:
        for chain in _entered.chains:
            chain.listening = False
    for chain in _entered.chains:
        if chain.heard:
            return chain._save, chain._load
    try:
        node._raw_saved_self.register_hooks(lambda t: t, lambda t: t)
    except RuntimeError:  # it has hooks already
        return None, None
    return None


def chain_of(hooks: tuple[Any, ...] | None) -> Chain | None:
    """Return the chain that a pair of hooks belongs to."""
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, Chain) else None


def _plain(tensor: Tensor) -> bool:
    """Whether size, stride and offset say all about a tensor but its storage."""
    ordinary = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return (
        ordinary
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.untyped_storage().nbytes() > 0
    )


def _by_storage(tensors: Iterable[Tensor]) -> dict[int, Any]:
    storages = (t.untyped_storage() for t in tensors if t.layout is torch.strided)
    return {id(s): weakref.ref(s) for s in storages}


def _known(found: dict[int, Any], storage: torch.UntypedStorage) -> bool:
    known = found.get(id(storage))
    return known is not None and known() is storage
