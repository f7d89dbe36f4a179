"""Where the meters listen: one interception of torch's dispatcher, shared by all that are on.

A meter is a context manager. The first one that is entered pushes a `TorchDispatchMode`; those
entered inside it join that mode, so that several meters cost one interception of each operator.
Nothing of torch is changed, and outside the contexts no code of this package runs.

    class Count(Meter):
        def opened(self):
            self.number = 0

        def after(self, func, args, kwargs, out):
            self.number += 1
            return out

    with Count() as meter:
        model(x).sum().backward()

Limits: a mode belongs to the thread that entered it (autograd hands it on to its own threads);
of compiled regions the calls of library kernels are heard (matrix products, collectives), generated
kernels are not; operators on the inside of a custom operator are not seen, the custom operator
is. With `create_graph=True` backward counts as recomputation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from ms_profile import modules

__all__ = ["Meter", "Phase", "module", "phase", "unmetered"]

Phase = Literal["forward", "backward", "recompute", "other"]
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_CPU = torch._C.DispatchKey.CPU
_Self = TypeVar("_Self", bound="Meter")
_log = logging.getLogger("ms_profile")


def phase() -> Phase:
    """What the operator that is being dispatched belongs to.

    `backward` and `recompute` are inside an autograd pass; there, what is run with gradients on, or
    in the forward of a `torch.autograd.Function`, is taken for a forward that is run again (a
    Function whose backward applies a Function is not told from that). `other` is outside of one
    with gradients off: evaluation, an optimizer step.
    """
    grad = torch.is_grad_enabled()
    # Function.apply switches forward-mode gradients off as well, `no_grad` does not.
    in_function = not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())
    if torch._C._current_graph_task_id() == -1:
        return "forward" if grad or in_function else "other"
    return "recompute" if grad or in_function else "backward"


def module() -> str:
    """Dotted path of the module that the operator belongs to; empty when it is none's.

    Known only while a meter with `watches_modules` is on. In backward it is the module whose
    forward made the autograd node.
    """
    return modules.current()


class Meter:
    """Context manager that hears every operator that torch dispatches.

    Subclasses override `before` and `after`, and `opened` and `closed` for their own state. Higher-
    order operators (flex_attention, cond) reach `after` of those with `hears_higher_order`; what
    they run inside is not heard.

    Attributes:
        tolerant: what `before` and `after` raise reaches the caller of the operator, unless this is
            set: then it is logged, kept as `failure`, and the meter hears nothing more until it is
            entered again. For a training that must not end because it is measured.
        failure: what a tolerant meter failed with.

    Raises:
        RuntimeError: the meter is entered while it is on, or left out of order.
    """

    watches_modules: ClassVar[bool] = False
    hears_higher_order: ClassVar[bool] = False
    tolerant: bool = False
    failure: Exception | None = None

    _tap: _Tap | None = None

    def opened(self) -> None:
        """Called when the context is entered, before the first operator."""

    def closed(self) -> None:
        """Called when the context is left, after the last operator."""

    def before(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called before an operator runs."""

    def after(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> Any:
        """Called with an operator's result; returns it, or what the caller gets instead."""
        return out

    def __enter__(self: _Self) -> _Self:
        if self._tap is not None:
            raise RuntimeError(
                f"this {type(self).__name__} is on already: make a second one to nest them"
            )
        top = _get_current_dispatch_mode()
        tap = top if isinstance(top, _Tap) else _Tap()
        self.failure = None
        if self.watches_modules:
            modules.watch()
        try:
            self.opened()
            if not tap.meters:
                tap.__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            if self.watches_modules:
                modules.unwatch()
            raise
        tap.add(self)
        self._tap = tap
        return self

    def __exit__(self, *exc: object) -> None:
        tap = self._tap
        if tap is None:
            raise RuntimeError(f"this {type(self).__name__} is not on")
        if len(tap.meters) == 1 and _get_current_dispatch_mode() is not tap:
            raise RuntimeError(
                f"{type(self).__name__} is left before a dispatch mode that was entered after it"
            )
        self._tap = None
        tap.remove(self)
        if not tap.meters:
            tap.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self.watches_modules:
            modules.unwatch()
        self.closed()

    @property
    def is_on(self) -> bool:
        """Whether the context is entered."""
        return self._tap is not None


class _Tap(TorchDispatchMode):
    """The mode; `meters` in the order in which they were entered."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meters: tuple[Meter, ...] = ()
        self._before: tuple[Callable[..., None], ...] = ()
        self._after: tuple[Callable[..., Any], ...] = ()
        self._after_higher_order: tuple[Callable[..., Any], ...] = ()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave torch.compile on: else what is called under a mode stays uncompiled for good."""
        return True

    def add(self, meter: Meter) -> None:
        self._set((*self.meters, meter))

    def remove(self, meter: Meter) -> None:
        self._set(tuple(each for each in self.meters if each is not meter))

    def _set(self, meters: tuple[Meter, ...]) -> None:
        self.meters = meters
        # Methods that a meter does not override are not called at all.
        well = tuple(m for m in meters if m.failure is None)
        self._before = self._callbacks(well, "before")
        self._after = self._callbacks(well[::-1], "after")
        higher = tuple(m for m in well[::-1] if m.hears_higher_order)
        self._after_higher_order = self._callbacks(higher, "after")

    def _callbacks(self, meters: tuple[Meter, ...], name: str) -> tuple[Callable[..., Any], ...]:
        """The methods of that name; one that a meter does not override is not called at all."""
        mine = (m for m in meters if getattr(type(m), name) is not getattr(Meter, name))
        return tuple(self._guarded(m, name) if m.tolerant else getattr(m, name) for m in mine)

    def _guarded(self, meter: Meter, name: str) -> Callable[..., Any]:
        method = getattr(meter, name)

        def call(func: OpOverload, args: Any, kwargs: Any, *out: Any) -> Any:
            try:
                return method(func, args, kwargs, *out)
            except Exception as error:
                if meter.failure is None:
                    meter.failure = error
                    kind = type(meter).__name__
                    _log.warning("%s failed at %s and is switched off: %r", kind, func, error)
                    self._set(self.meters)
                return out[0] if out else None

        return call

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # A wrapper (DTensor, a tensor in flight) unwraps itself first and then comes back here.
        if types and any(hasattr(each, "__tensor_flatten__") for each in types):
            return NotImplemented
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return self._higher_order(func, args, kwargs)
        if _is_composite(func):
            # Seen in inference mode only: elsewhere autograd has taken it apart before.
            with self:
                return func.decompose(*args, **kwargs)
        for before in self._before:
            before(func, args, kwargs)
        out = func(*args, **kwargs)
        for after in self._after:
            out = after(func, args, kwargs, out)
        return out

    def _higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        for after in self._after_higher_order:
            out = after(func, args, kwargs, out)
        return out


@cache
def _is_composite(func: OpOverload) -> bool:
    if func.namespace == "prim":
        # Of the interpreter (a fake tensor's device), unknown to the dispatcher, which would raise.
        return False
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    # silu_backward has both: taken apart it would compute otherwise, and keep more memory.
    return has_kernel(func.name(), _COMPOSITE) and not has_kernel(func.name(), _CPU)


@contextmanager
def unmetered() -> Iterator[None]:
    """Inside, no meter of this thread hears anything: for work that belongs to the measuring."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield
