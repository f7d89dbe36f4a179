"""Saved tensors that wait on the host: out behind forward, back ahead of backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..device import Device, Event
from ..errors import refuse
from ..stages import Holder
from .pool import HostPool

# Names the group of a saved storage; None: it stays on the device.
Choice = Callable[[Holder, Tensor], str | None]


class _Item:
    """One storage that was copied out.

    Attributes:
        released: the device's copy was given up.
        wanted: backward has not asked for it yet.
    """

    def __init__(self, swap: Prefetcher, group: _Group, holder: Holder, flat: Tensor) -> None:
        self._device, self._pool = swap.device, swap.pool
        self._nbytes = flat.untyped_storage().nbytes()
        self.group = group
        self._block = swap.pool.take(flat.numel() * flat.element_size())
        self._host = self._block.view(flat)
        self._device.d2h.wait(self._device.record())
        self._out = self._device.d2h.copy([(self._host, flat)])
        self._back: Event | None = None
        self._fetched: Tensor | None = None
        self.released = False
        self.wanted = True
        # Runs while the holder's tensor is still there.
        self._holder: weakref.ref[Holder] | None = weakref.ref(holder, lambda _: self._end())

    def release(self) -> None:
        """Give up the device's copy once it is on the host."""
        holder = None if self._holder is None else self._holder()
        if self.released or holder is None:
            return
        assert holder.tensor is not None
        if holder.tensor.untyped_storage().nbytes() != self._nbytes:
            where = f"a tensor of {self.group.name!r} was emptied while it was copied to the host"
            refuse("E-M10", where, "leave out the feature that empties it, or do not swap there")
        self._out.wait()
        holder.tensor = None
        self.released = True

    def fetch(self) -> None:
        """Start the way back; nothing where it has started."""
        if not self.released or self._fetched is not None:
            return
        self._fetched = self._device.empty_like(self._host)
        # What had the new tensor's memory before must be over.
        self._device.h2d.wait(self._device.record())
        self._device.h2d.wait(self._out)
        self._back = self._device.h2d.copy([(self._fetched, self._host)])

    def get(self) -> Tensor:
        """Return the tensor on the device."""
        self.fetch()
        assert self._fetched is not None
        assert self._back is not None
        self._back.wait()
        self.wanted = False
        return self._fetched

    def drop(self) -> None:
        """Give up what was fetched; it can be fetched again."""
        if self._fetched is not None and self._back is not None:
            self._back.wait()
            self._fetched = None
            self.wanted = True

    def _end(self) -> None:
        self._holder = None
        # A graph may die before backward, with a copy under way in either direction.
        last = self._out if self._back is None else self._back
        last.wait()
        self._fetched = None
        self._pool.give(self._block, last)
        self.group.items.pop(id(self), None)


class _Group:
    """What one call of a module saved.

    Attributes:
        items: in the order of saving, by identity.
    """

    def __init__(self, name: str, index: int, step: _Forward) -> None:
        self.name = name
        self.index = index
        self.step = step
        self.items: dict[int, _Item] = {}

    def each(self, act: Callable[[_Item], None], backwards: bool = False) -> None:
        items = list(self.items.values())
        for item in reversed(items) if backwards else items:
            act(item)


class _Forward:
    """One forward of the model: its groups in order, and where its backward is."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.groups: list[_Group] = []
        self.released = 0  # groups before this one are
        self.reached = -1  # group that backward is in


class Prefetcher:
    """A placement on the host for `session.chain.place`.

    A storage is copied out as soon as it is saved. The device's copy is given up when `depth`
    further groups have run, at the latest when the model's forward ends. When backward reaches a
    group, the `depth` groups before it in the same forward start their way back; other forwards
    (micro-batches, chunks of a pipeline) are not touched, whatever their order.

    Args:
        device: where the tensors are.
        pool: host memory.
        choose: names the group of a storage, None to keep it.
        depth: how many groups copies may take; 0 waits for each copy.
    """

    def __init__(self, device: Device, pool: HostPool, choose: Choice, depth: int = 1) -> None:
        if depth < 0:
            raise ValueError(f"Prefetcher: depth: got {depth}, need 0 or more")
        self.device = device
        self.pool = pool
        self.depth = depth
        self._choose = choose
        self._now = _Forward(-1)

    def save(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        """Start a storage's way out; returns it, for as long as it is needed here."""
        # What is recomputed inside backward is wanted at once.
        if _in_backward() or not self.device.owns(tensor):
            return None
        name = self._choose(holder, tensor)
        if name is None:
            return None
        group = self._group(holder.forward, name)
        item = _Item(self, group, holder, tensor)
        group.items[id(item)] = item
        holder.state[self] = item
        return tensor

    def load(self, holder: Holder) -> Tensor | None:
        """Return a storage that has left; None where it has not."""
        item: _Item | None = holder.state.get(self)
        if item is None:
            return None
        if not _shared_later(item.group):
            self._reach(item.group.step, item.group.index)
        return item.get() if item.released else None

    def follow(self, model: nn.Module) -> RemovableHandle:
        """See where forward and backward of a model end and begin; returns what stops that."""
        return model.register_forward_hook(self._forward_ended, always_call=True)

    def _group(self, number: int, name: str) -> _Group:
        if self._now.number != number:
            self._release(self._now, len(self._now.groups))
            self._now = _Forward(number)
        groups = self._now.groups
        if not groups or groups[-1].name != name:
            groups.append(_Group(name, len(groups), self._now))
            self._release(self._now, len(groups) - 1 - self.depth)
        return groups[-1]

    def _release(self, step: _Forward, stop: int) -> None:
        for group in step.groups[step.released : max(stop, 0)]:
            group.each(_Item.release)
        step.released = max(step.released, stop)

    def _reach(self, step: _Forward, index: int) -> None:
        if step.reached == index:
            return
        step.reached = index
        # Only where a graph is kept for a second backward is there anything to drop.
        for group in step.groups[index + 2 :]:
            group.each(_Item.drop)
        for group in reversed(step.groups[max(0, index - self.depth) : index + 1]):
            group.each(_Item.fetch, backwards=True)

    def _forward_ended(self, module: nn.Module, args: Any, output: Any) -> None:
        step = self._now
        self._release(step, len(step.groups))
        if not step.groups or not self.depth:
            return

        def begin(grad: Tensor) -> None:
            if step.reached < 0:
                self._reach(step, len(step.groups))

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(begin)


def _shared_later(group: _Group) -> bool:
    """Whether a group is asked for while later ones wait: a module there saved the same storage.

    Such a storage comes by itself; backward is not where it was first saved.
    """
    between = group.step.groups[group.index + 1 : max(group.step.reached, 0)]
    return any(item.wanted for other in between for item in other.items.values())


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
