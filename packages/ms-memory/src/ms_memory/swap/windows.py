"""Swaps in step with the layers of a model, so that every copy has one known window.

Layer i's copies run out while layer i + 1 computes forward, and come back while layer i + 1
computes backward, whether or not layer i + 1 is swapped itself. Then the bytes that are on their
way at any moment, and what does not hide, follow from each layer alone: what a plan predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..device import Device
from ..stages import Holder
from .modules import inside
from .pool import HostPool
from .prefetch import Choice, Prefetcher, _Forward, _Group, _in_backward, _Item

if TYPE_CHECKING:
    from ..session import Session


class Windows(Prefetcher):
    """A prefetcher whose groups are the layers of a model.

    A layer's storages are given up when the layer after it has run forward, and start their way
    back when that layer's backward begins. The last layer's are given up, and fetched, at once:
    no layer follows it.

    Args:
        device: where the tensors are.
        pool: host memory.
        choose: names the layer of a storage that goes, None to keep it.
        layers: all layers, in the order of forward.
        number: returns the number of the current forward.
    """

    def __init__(
        self,
        device: Device,
        pool: HostPool,
        choose: Choice,
        layers: Sequence[str],
        number: Callable[[], int],
    ) -> None:
        super().__init__(device, pool, choose, depth=1)
        self._places = {name: place for place, name in enumerate(layers)}
        self._number = number

    def load(self, holder: Holder) -> Tensor | None:
        """Return a storage that has left; None where it has not."""
        # Where backward is, layers tell: what several share, the first one's storages hold.
        item: _Item | None = holder.state.get(self)
        return item.get() if item is not None and item.released else None

    def follow(self, model: nn.Module) -> RemovableHandle:
        """See where layers end; returns what stops that for the end of forward."""
        return model.register_forward_hook(self._forward_ended, always_call=True)

    def follow_layer(self, name: str, module: nn.Module) -> RemovableHandle:
        """See where a layer's forward ends and its backward begins; returns what stops that."""
        place = self._places[name]

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            step = self._now
            if step.number != self._number() or _in_backward():
                return  # nothing of this forward has left yet
            last = place + 1 == len(self._places)
            self._release(step, place + 1 if last else place)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: self._reach(step, place))
                    break

        return module.register_forward_hook(leave)

    def _group(self, number: int, name: str) -> _Group:
        if self._now.number != number:
            self._release(self._now, len(self._now.groups))
            self._now = step = _Forward(number)
            step.groups = [_Group(one, place, step) for one, place in self._places.items()]
        return self._now.groups[self._places[name]]

    def _forward_ended(self, module: nn.Module, args: Any, output: Any) -> None:
        self._release(self._now, len(self._now.groups))


def windows(
    session: Session, parts: Sequence[str], layers: Sequence[str], min_bytes: int
) -> Windows:
    """Let what some modules save wait on the host, in step with all layers.

    Args:
        session: whose model.
        parts: paths of layers, or of modules in them.
        layers: paths of all layers, in the order of forward.
        min_bytes: storages below stay.

    Raises:
        RuntimeError: the model is on the processor.
    """
    session.device.d2h  # noqa: B018  refuses where there is no other place
    # Sorted by layer: a storage belongs to the layer whose module saved it first.
    owners = {part: layer for layer in layers for part in parts if within(part, layer)}
    choose = inside(parts, min_bytes)

    def layer_of(holder: Any, tensor: Tensor) -> str | None:
        part = choose(holder, tensor)
        return None if part is None else owners[part]

    chain = session.chain
    made = Windows(session.device, session.host, layer_of, layers, lambda: chain.forward)
    chain.place(made)  # it stays, so that graphs outlive the session
    session.on_close(made.follow(session.model).remove)
    for name in layers:
        handle = made.follow_layer(name, session.model.get_submodule(name))
        session.on_close(handle.remove)
    return made


def within(path: str, outer: str) -> bool:
    """Whether a module is another one or lies in it."""
    return path == outer or path.startswith(f"{outer}.")
