"""Which modules' saved tensors go to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..recompute.match import Layers, Plan, chosen, layer_index, matched
from ..stages import Codec, Holder
from .pool import HostPool
from .prefetch import Choice, Prefetcher

if TYPE_CHECKING:
    from ..session import Session

FEATURE = "swap"


class Swapped:
    """Modules whose saved tensors wait on the host.

    Attributes:
        names: of the modules, in the model's order.
        prefetcher: what moves them.
    """

    def __init__(self, names: list[str], prefetcher: Prefetcher) -> None:
        self.names = names
        self.prefetcher = prefetcher


class _Within:
    """A codec for some storages."""

    def __init__(self, codec: Codec, choose: Choice) -> None:
        self._codec = codec
        self._choose = choose

    def encode(self, holder: Holder, tensor: Tensor) -> Tensor | None:
        wanted = self._choose(holder, tensor) is not None
        return self._codec.encode(holder, tensor) if wanted else None

    def decode(self, holder: Holder, tensor: Tensor) -> Tensor:
        return self._codec.decode(holder, tensor)


def modules(
    session: Session,
    plan: Plan,
    *,
    layers: Layers | Literal["auto"] = "auto",
    depth: int = 1,
    min_bytes: int = 524_288,
    codec: Codec | None = None,
    exclude: Callable[[Tensor], bool] | None = None,
    pin: bool = True,
) -> Swapped:
    """Let what modules save for backward wait on the host.

    A storage leaves as soon as it is saved and comes back ahead of its use, see `Prefetcher`.
    Parameters, buffers, inputs of the model and what another feature owns stay.

    Args:
        session: whose model.
        plan: names of modules with wildcards, such as `["*.self_attn"]`, or a function of name and
            module. A module inside a matched one belongs to it.
        layers: which of the matched modules: None all, a number the first so many layers, a slice,
            or a function of the layer's index; "auto" all but the last layer, whose backward
            follows at once, so that nothing could hide its way back.
        depth: over how many modules' time copies may stretch, in either direction.
        min_bytes: storages below stay.
        codec: form in which they travel.
        exclude: says of a flat storage that it stays.
        pin: pinned host memory; without, copies hold the program.

    Returns:
        What was matched.

    Raises:
        MemoryFeatureError: E-M22, nothing matched; E-M10, another feature acts on a module; later,
            in forward, E-M32, the session's host bytes are exceeded.
        RuntimeError: the model is on the processor.
    """
    paths = [path for path, _ in matched(session.model, plan)]
    outer = [p for p in paths if _owner(p.rpartition(".")[0], paths) is None]
    if layers == "auto":
        names = _all_but_last(session, outer)
    else:
        names = chosen(session.model, outer, layers)
    for name in names:
        session.claim(session.model.get_submodule(name), FEATURE, f"depth {depth}")
    choose = inside(names, min_bytes, exclude)
    return install(session, names, choose, depth=depth, codec=codec, pin=pin)


def install(
    session: Session,
    names: list[str],
    choose: Choice,
    *,
    depth: int = 1,
    codec: Codec | None = None,
    pin: bool = True,
) -> Swapped:
    """Place chosen storages on the host, until the session closes; for other features to call.

    Args:
        session: whose model.
        names: of the modules, for messages.
        choose: names the group of a storage; None keeps it.
        depth: see `modules`, as what follows.
        codec: form in which they travel.
        pin: pinned host memory.
    """
    session.device.d2h  # noqa: B018  refuses where there is no other place
    host = session.host
    pool = host if pin else HostPool(session.device, host.cap, pin=False, ledger=host.ledger)
    prefetcher = Prefetcher(session.device, pool, choose, depth)
    if codec is not None:
        session.on_close(session.chain.code(_Within(codec, choose)))
    # It stays in the chain, so that graphs outlive the session.
    session.chain.place(prefetcher)
    session.on_close(prefetcher.follow(session.model).remove)
    return Swapped(names, prefetcher)


def inside(
    names: Sequence[str], min_bytes: int = 0, exclude: Callable[[Tensor], bool] | None = None
) -> Choice:
    """Return a choice of all storages of some bytes that modules save."""
    owners: dict[str, str | None] = {}

    def choose(holder: Holder, tensor: Tensor) -> str | None:
        if holder.nbytes < min_bytes or (exclude is not None and exclude(tensor)):
            return None
        # Thousands of saves a step ask for few modules.
        module = holder.site.module
        if module not in owners:
            owners[module] = _owner(module, names)
        return owners[module]

    return choose


def _all_but_last(session: Session, paths: list[str]) -> list[str]:
    layers = [layer_index(session.model, p) for p in paths]
    if layers[-1] is None:
        return paths[:-1] or paths
    return [p for p, layer in zip(paths, layers, strict=True) if layer != layers[-1]] or paths


def _owner(module: str, names: Sequence[str]) -> str | None:
    """Return the name that a module is or lies in."""
    for name in names:
        if module == name or module.startswith(name + "."):
            return name
    return None
