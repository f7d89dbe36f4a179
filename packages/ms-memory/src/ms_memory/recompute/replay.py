"""What a region reads beside its arguments, and must find again: random states and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Source = tuple[Callable[[], Any], Callable[[Any], None]]
Rng = Literal["auto", "always", "never"]
RNGS: tuple[Rng, ...] = ("auto", "always", "never")


def default_sources(device: torch.device | None = None) -> tuple[Source, ...]:
    """Return get and set of torch's generators: that of the CPU, and of an accelerator.

    Args:
        device: where tensors are; None or the CPU: only the CPU's generator.
    """
    cpu = (torch.get_rng_state, torch.set_rng_state)
    if device is None or device.type in ("cpu", "meta"):
        return (cpu,)
    module = torch.get_device_module(device)
    get = module.get_rng_state
    return (cpu, (lambda: get(device), lambda state: module.set_rng_state(state, device)))


class Replay:
    """Takes the states around one run of a region, and gives them to its second run.

    Args:
        sources: get and set of each generator's state.
        rng: "auto" gives back the states that the first run changed, "always" all, "never" none.
        devices: types of devices whose autocast counts.
    """

    def __init__(self, sources: Sequence[Source], rng: Rng, devices: Sequence[str]) -> None:
        self._rng = rng
        self._sources = tuple(sources) if rng != "never" else ()
        self._states: list[Any] = []
        self._autocast = [_autocast_of(kind) for kind in devices]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Around the first run."""
        before = [copied(get()) for get, _ in self._sources]
        yield
        if self._rng == "auto":
            # A state costs a few kB a region: the generators that were not drawn from are dropped.
            drawn = [not _same(b, get()) for b, (get, _) in zip(before, self._sources, strict=True)]
            before = [b for b, d in zip(before, drawn, strict=True) if d]
            self._sources = tuple(s for s, d in zip(self._sources, drawn, strict=True) if d)
        self._states = before

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around the second run: the states are those of the first, and afterwards as before."""
        current = [copied(get()) for get, _ in self._sources]
        try:
            for state, (_, put) in zip(self._states, self._sources, strict=True):
                put(state)
            with contextlib.ExitStack() as stack:
                for kwargs in self._autocast:
                    stack.enter_context(torch.autocast(**kwargs))
                yield
        finally:
            for state, (_, put) in zip(current, self._sources, strict=True):
                put(state)


def _autocast_of(kind: str) -> dict[str, Any]:
    return {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def copied(state: Any) -> Any:
    """Copy containers: a tracker may hand out its own dictionary."""
    if isinstance(state, dict):
        return {k: copied(v) for k, v in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)
