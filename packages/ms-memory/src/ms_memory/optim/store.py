"""State tensors and masters that lie on the host, and their copies on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import Device, Event
from ..errors import refuse
from .shards import divided_as, local, same_memory

MASTER = "master"  # name under which a parameter itself is kept


class Store:
    """Moves what belongs to parameters between host and device.

    Args:
        device: where parameters are updated.
        keys: names of the state tensors that move; None: every floating tensor of the
            parameter's shape.
        masters: the parameters move too.
        limit: bound of bytes on the host; None: none.
    """

    def __init__(
        self, device: Device, keys: frozenset[str] | None, masters: bool, limit: int | None
    ) -> None:
        self.device = device
        self.keys = keys
        self.masters = masters
        self.limit = limit
        self.nbytes = 0
        self._hosts: dict[Tensor, dict[str, Tensor]] = {}
        self._last: Event | None = None
        self._leaving: list[Tensor] = []
        self._emptied: list[Tensor] = []

    def fetch(self, params: Sequence[Tensor], state: Any) -> Event | None:
        """Start the way in; returns an event to wait for, None where nothing is on the host."""
        found: list[tuple[Tensor, str, Tensor]] = []
        try:
            for p, key, host in self._absent(params, state):
                if key == MASTER:
                    self.device.restore_storage(p, nbytes_of(host))
                found.append((p, key, p if key == MASTER else self.device.empty_like(host)))
        except BaseException:
            # Out of memory: what is on the host stays the only copy.
            for p in (p for p, key, _ in found if key == MASTER):
                self.device.empty_storage(p)
            raise
        if not found:
            return None
        self.device.h2d.wait(self.device.record())
        event = self.device.h2d.copy([(t.detach(), self._hosts[p][k]) for p, k, t in found])
        for p, key, tensor in found:
            if key != MASTER:
                state[p][key] = divided_as(tensor, p)
        return event

    def keep(self, params: Sequence[Tensor], state: Any) -> None:
        """Start the way out of what is on the device; `let_go` ends it.

        Raises:
            MemoryFeatureError: E-M32, the bound is exceeded.
            TypeError: a tensor of another class.
        """
        pairs = []
        for p in params:
            for key, value in list(self.moved(p, state)):
                known, tensor = self._hosts.get(p, {}).get(key), local(value)
                if known is None or not same_memory(known, tensor):
                    host = self.host(p, key, tensor)
                    pairs.append((host, tensor.detach()))
                    self._leaving.append(tensor)
                    state[p][key] = divided_as(host, p)
            if self.masters and p.untyped_storage().nbytes():
                pairs.append((self.host(p, MASTER, p), p.detach()))
                self._emptied.append(p)
        if pairs:
            self.device.d2h.wait(self.device.record())
            self._last = self.device.d2h.copy(pairs)

    def let_go(self) -> None:
        """Give up on the device what has been copied out, once it has."""
        if self._last is not None:
            self._last.wait()
        for p in self._emptied:
            self.device.empty_storage(p)
        self._emptied = []
        self._leaving = []

    def sync(self) -> None:
        """Hold the program until the host has everything."""
        if self._last is not None:
            self._last.synchronize()

    def forget(self) -> None:
        """Free the host's copies."""
        self._hosts.clear()
        self.nbytes = 0

    def moved(self, p: Tensor, state: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of the state that moves, wherever it is."""
        for key, value in state.get(p, {}).items():
            if self.moves(p, key, value):
                yield key, value

    def moves(self, p: Tensor, key: str, value: Any) -> bool:
        """Whether a value is state that moves.

        Raises:
            TypeError: it is a tensor of another class.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        # Parameters of one element have steps of their shape.
        of_shape = value.shape == p.shape and key != "step"
        if not (of_shape if self.keys is None else key in self.keys):
            return False
        if type(local(value)) is not Tensor:
            got = f"state {key!r} of class {type(value).__name__}"
            raise TypeError(f"Streamed: got {got}, need plain tensors or DTensors of those")
        return True

    def host(self, p: Tensor, key: str, like: Tensor) -> Tensor:
        """Return the host's tensor for one place, of a shape and dtype."""
        known = self._hosts.setdefault(p, {}).get(key)
        if known is not None and known.shape == like.shape and known.dtype is like.dtype:
            return known
        size = nbytes_of(like)
        before = 0 if known is None else nbytes_of(known)
        if self.limit is not None and self.nbytes - before + size > self.limit:
            where = f"{self.nbytes} bytes are out, {size} more exceed {self.limit}"
            refuse("E-M32", where, "raise host_bytes")
        self.nbytes += size - before
        host = self.device.pinned(size).view(like.dtype).view(like.shape)
        self._hosts[p][key] = host
        return host

    def _absent(self, params: Sequence[Tensor], state: Any) -> list[tuple[Tensor, str, Tensor]]:
        """Return parameter, name and host tensor of what is not on the device."""
        return [
            (p, key, host)
            for p in params
            for key, host in self._hosts.get(p, {}).items()
            if self._is_absent(p, key, host, state)
        ]

    def _is_absent(self, p: Tensor, key: str, host: Tensor, state: Any) -> bool:
        if key == MASTER:
            return p.untyped_storage().nbytes() == 0
        here = state[p].get(key)
        return here is not None and same_memory(local(here), host)


def nbytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements that this rank has."""
    return local(tensor).numel() * tensor.element_size()


def check_masters(params: Sequence[Tensor]) -> None:
    """Refuse parameters whose storages cannot be emptied.

    Raises:
        ValueError: one shares its storage.
    """
    for index, p in enumerate(params):
        alone = p.untyped_storage().nbytes() == nbytes_of(p) and p.is_contiguous()
        if type(p.data) is not torch.Tensor or not alone:
            got = f"parameter {index} of shape {tuple(p.shape)} inside a larger storage"
            raise ValueError(f"Streamed: masters: got {got}, need tensors of their own")
