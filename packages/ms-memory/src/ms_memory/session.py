"""What ms-memory does to one model, and its undoing."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .chain import Chain, chain_of, top_hooks
from .errors import refuse
from .ledger.saved import SavedLedger, state_of
from .patching import Wrapped
from .recompute.replay import Source, default_sources
from .stages import Site

if TYPE_CHECKING:
    from .device import Device
    from .swap import HostPool

_OWNER = "_ms_memory_session"


@dataclass(frozen=True)
class Action:
    """What is done at one module.

    Attributes:
        module: its dotted path.
        feature: which feature does it.
        detail: how.
    """

    module: str
    feature: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What a session does.

    Attributes:
        actions: in the order in which they were asked for.
        saved_bytes: of the last forward, by its ledger; None where nobody asked for one.
    """

    actions: tuple[Action, ...]
    saved_bytes: int | None

    def __str__(self) -> str:
        """A line for each action, then the bytes."""
        width = max((len(a.module) for a in self.actions), default=0)
        lines = [f"{a.module:<{width}}  {a.feature}  {a.detail}".rstrip() for a in self.actions]
        if self.saved_bytes is not None:
            lines.append(f"saved by the last forward: {self.saved_bytes} bytes")
        return "\n".join(lines)


class Session:
    """Owns all that is done to the memory of one model, until it is closed.

    Args:
        model: any module. While the session is open, each forward of it runs under the session's
            chain of saved-tensor hooks, where a feature needs that.
        device: where the model runs, as `ms_memory.device.resolve` takes it; "auto": where its
            first parameter is.
        host_bytes: bound of bytes on the host; None: none.
        rng: generators that recomputation replays: "cpu", "device".
        strict: refuse where saved-tensor hooks of others would take the tensors that this
            session's features place; else leave the tensors to them.

    Attributes:
        chain: where features register their stages.
        sources: get and set of the generators that recomputation replays.
        paths: dotted path of each module.

    Raises:
        MemoryFeatureError: E-M20, a module is in another open session.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | Device = "auto",
        host_bytes: int | None = None,
        rng: Sequence[str] = ("cpu", "device"),
        strict: bool = True,
    ) -> None:
        unknown = set(rng) - {"cpu", "device"}
        if unknown:
            raise ValueError(f"Session: rng: got {sorted(unknown)}, need 'cpu' or 'device'")
        self.model = model
        self.paths = {m: name for name, m in model.named_modules()}
        self._own()
        self._where = device
        self._host_bytes = host_bytes
        self.chain = Chain(self._site)
        self.strict = strict
        self.closed = False
        self.actions: list[Action] = []
        every = zip(default_sources(_device_of(model)), ("cpu", "device"), strict=False)
        self.sources: list[Source] = [source for source, name in every if name in rng]
        self._ledger: SavedLedger | None = None
        self._claims: dict[nn.Module, tuple[str, bool]] = {}
        self._wrapped: list[tuple[str, Wrapped]] = []
        self._undo: list[Callable[[], object]] = []
        self._needed = False
        self._tracked = False
        self._stack: list[list[Any]] = []
        self._calls: dict[str, int] = {}
        self._depth = 0
        self.wrap(model, self._root)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @functools.cached_property
    def device(self) -> Device:
        """Where the model runs."""
        from .device import device_of, resolve

        auto = isinstance(self._where, str) and self._where == "auto"
        return device_of(_device_of(self.model)) if auto else resolve(self._where)

    @functools.cached_property
    def host(self) -> HostPool:
        """Memory on the host, where tensors go."""
        from .swap import HostPool

        return HostPool(self.device, self._host_bytes)

    @property
    def ledger(self) -> SavedLedger:
        """What the last forward saved; it counts from when it is first asked for."""
        if self._ledger is None:
            self._ledger = SavedLedger()
            self.chain.watch(self._ledger)
        return self._ledger

    def register_rng(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        """Let recomputation replay another generator, for regions that run from now on.

        Args:
            get: returns its state.
            put: sets it.
        """
        self.sources.append((get, put))

    def path(self, module: nn.Module) -> str:
        """Return the dotted path of a module of the model."""
        path: str = self.paths[module]
        return path

    def claim(
        self, module: nn.Module, feature: str, detail: str = "", region: bool = False
    ) -> None:
        """Note that a feature acts on a module.

        Args:
            module: a module of the model.
            feature: its name for messages.
            detail: for the report.
            region: it drops all that is saved inside the module.

        Raises:
            MemoryFeatureError: E-M10, another feature acts on it; E-M05, the module lies in a
                region that is computed again as a whole, or contains what another feature drops.
        """
        path = self.path(module)
        for other, (name, whole) in self._claims.items():
            where = f"{feature} of {path!r} and {name} of {self.path(other)!r}"
            if other is module:
                refuse("E-M10", where, "leave one of them out")
            inner = (whole and _inside(path, self.path(other))) or (
                region and _inside(self.path(other), path)
            )
            if inner:
                refuse("E-M05", where, "leave the inner one out: the outer drops it anyway")
        self._claims[module] = feature, region
        self.actions.append(Action(path, feature, detail))

    def wrap(
        self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Replace the forward of a module until the session is closed."""
        self._wrapped.append((self.path(module), Wrapped(module, make)))

    def on_close(self, undo: Callable[[], object]) -> None:
        """Have something undone when the session is closed, last first."""
        self._undo.append(undo)

    def need_chain(self) -> None:
        """Run each forward under the chain, also where it has no stage."""
        self._needed = True

    def track(self) -> None:
        """Number the sites of saved tensors by module."""
        if self._tracked:
            return
        self._tracked = True
        for module, path in self.paths.items():
            self._hook(module, path)

    @contextlib.contextmanager
    def trial(self) -> Iterator[Session]:
        """Let another session act on the model, within; this one must have nothing to do.

        It has this one's device, bound of host bytes and generators.

        Raises:
            MemoryFeatureError: E-M20, a feature acts on the model already.
        """
        if self.actions or self.chain.codecs or self.chain.placements:
            refuse("E-M20", "a session that acts already", "profile before anything is installed")
        self._disown()
        try:
            with Session(
                self.model, device=self.device, host_bytes=self._host_bytes, strict=self.strict
            ) as other:
                other.sources = list(self.sources)
                yield other
        finally:
            self._own()

    def report(self) -> Report:
        """Return what is done, and the bytes of the last forward."""
        saved = None if self._ledger is None else self._ledger.nbytes
        return Report(tuple(self.actions), saved)

    def close(self) -> None:
        """Undo everything; a second call does nothing.

        Raises:
            MemoryFeatureError: E-M21, somebody replaced a forward since; the rest is undone, and
                what is under that replacement has no effect any more.
        """
        if self.closed:
            return
        self.closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._disown)
            for undo in self._undo:
                stack.callback(undo)
        # In reverse: the same module may have been wrapped twice.
        foreign = [path for path, wrapped in reversed(self._wrapped) if not wrapped.undo()]
        if foreign:
            where = f"forward of {', '.join(repr(p) for p in foreign)}"
            refuse("E-M21", where, "close the session first, then undo the other patch")

    def _own(self) -> None:
        for module, path in self.paths.items():
            owner = module.__dict__.get(_OWNER)
            other = None if owner is None else owner()
            if other is not None and not other.closed and module in other.paths:
                refuse("E-M20", f"{path!r}", "close the other session first, or use it")
        for module in self.paths:
            module.__dict__[_OWNER] = weakref.ref(self)

    def _disown(self) -> None:
        for module in self.paths:
            module.__dict__.pop(_OWNER, None)

    def _root(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._depth or not torch.is_grad_enabled() or not self._acts():
                return original(*args, **kwargs)
            with self._forward((args, kwargs)):
                return original(*args, **kwargs)

        return forward

    def _acts(self) -> bool:
        chain = self.chain
        moves = bool(chain.codecs or chain.placements)
        hooks = top_hooks()
        if hooks is not None and chain_of(hooks) is None:
            if moves and self.strict:
                remedy = "leave out the outer hooks or checkpoint, or pass strict=False"
                refuse("E-M10", "saved-tensor hooks around the model", remedy)
            return False
        if moves or chain.watches:
            self.track()
            return True
        return self._needed

    @contextlib.contextmanager
    def _forward(self, inputs: Any) -> Iterator[None]:
        self._depth += 1
        self._calls, self._stack = {"": 0}, [["", 0, 0]]
        self.chain.forward += 1
        self.chain.exclude(state_of(self.model))
        self.chain.fix(t for t in tree_leaves(inputs) if isinstance(t, Tensor))
        if self._ledger is not None:
            self._ledger.clear()
        try:
            with self.chain.hooks():
                yield
        finally:
            self._depth -= 1
            self._stack = []

    def _hook(self, module: nn.Module, path: str) -> None:
        def enter(_: nn.Module, __: Any) -> None:
            if self._depth and path:
                call = self._calls.get(path, 0)
                self._calls[path] = call + 1
                self._stack.append([path, call, 0])

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            if self._depth and path and self._stack[-1][0] == path:
                self._stack.pop()

        first = module.register_forward_pre_hook(enter)
        last = module.register_forward_hook(leave, always_call=True)
        self._undo += [first.remove, last.remove]

    def _site(self) -> Site:
        if not self._stack:
            return Site()
        top = self._stack[-1]
        top[2] += 1
        return Site(top[0], top[1], top[2] - 1)


def _device_of(model: nn.Module) -> torch.device:
    first = next(iter(state_of(model)), None)
    return torch.device("cpu") if first is None else first.device


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")
