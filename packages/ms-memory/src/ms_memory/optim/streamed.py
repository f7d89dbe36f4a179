"""Optimizer state that lies on the host and passes through the device in each step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from ..device import Device, Event, device_of, resolve
from ..errors import refuse
from .adamw import PackedAdamW
from .bins import bins, peak
from .shards import divided_as, local
from .store import MASTER, Store, check_masters, nbytes_of

Groups = list[dict[str, Any]]


class Streamed(torch.optim.Optimizer):
    """Runs another optimizer whose state stays on the host between steps.

    A step takes the parameters group by group: the state of a group is copied in, `inner` updates
    these parameters on the device, the state is copied out. With two buffers the next group comes
    in while the last one leaves. The update is the inner optimizer's own, bit for bit.

    On the device the state takes nothing between steps and at most `peak_bytes()` in one: with G
    groups of n parameters in all and b bytes of state each, about 2 n b / G, or n b / G with one
    buffer.

    Between steps `state` holds the tensors on the host, so that `state_dict()` copies nothing.

    Of DTensors, as FSDP2 makes them, this rank's parts move; the states stay DTensors.

    Args:
        inner: any optimizer that updates each parameter by itself. Its parameter groups are shared,
            so that a scheduler may be given either of the two.
        groups: into how many groups the parameters are cut; a group is at least one parameter.
        double_buffer: let copies in both directions run at the same time.
        keys: names of the state tensors that move; None: every floating tensor of the
            parameter's shape.
        host_bytes: bound of what is on the host; None: none.
        masters: for parameters that are masters, not the weights of the model: they stay on the
            host too, with empty storages in between. It is called with the masters of each group
            after their update, to round them into the weights.
        device: None: that of the first parameter.

    Raises:
        MemoryFeatureError: E-M10, the inner optimizer packs masters; E-M32, in a step, more than
            `host_bytes`.
        TypeError: the inner optimizer updates parameters together (LBFGS), or, in a step, a state
            is a tensor of a class that is neither torch's own nor DTensor.
        ValueError: fewer than one group, or masters inside a larger storage.
        RuntimeError: the parameters are on the processor.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        groups: int = 16,
        double_buffer: bool = True,
        keys: Sequence[str] | None = None,
        host_bytes: int | None = None,
        masters: Callable[[list[Tensor]], None] | None = None,
        device: Device | None = None,
    ) -> None:
        if groups < 1:
            raise ValueError(f"Streamed: groups: got {groups}, need 1 or more")
        if isinstance(inner, torch.optim.LBFGS):
            raise TypeError("Streamed: inner: got LBFGS, need one that updates each parameter")
        if isinstance(inner, PackedAdamW):
            # It steps over runs of neighbouring parameters, and its masters are parts of weights.
            refuse("E-M10", "Streamed around PackedAdamW", "use one of them")
        self.inner = inner
        self.groups = groups
        self.double_buffer = double_buffer
        self.masters = masters
        self.residence: Literal["host", "device"] = "host"
        super().__init__(inner.param_groups, inner.defaults)
        self._share()
        params = self._params()
        where = device or (device_of(params[0].device) if params else resolve("auto"))
        where.d2h  # noqa: B018  refuses where there is no other place
        moved = None if keys is None else frozenset(keys)
        self._store = Store(where, moved, masters is not None, host_bytes)
        if masters is not None:
            check_masters(params)
        self._send(params)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the inner optimizer, group by group.

        Args:
            closure: computes the loss again; called once.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        if self.residence == "device":
            self.inner.step()
            self._publish(self._params())
        else:
            with self._whole() as (groups, kept):
                self._stream(groups, kept)
        return loss

    def residency(self, where: Literal["host", "device"]) -> None:
        """Move all state, and let steps find it there from now on."""
        if where not in ("host", "device"):
            raise ValueError(f"Streamed: residency: got {where!r}, need 'host' or 'device'")
        if where == self.residence:
            return
        self.residence = where
        if where == "host":
            self._send(self._params())
            return
        event = self._store.fetch(self._params(), self.state)
        if event is not None:
            event.wait()
            event.synchronize()  # the host's copies go
        self._store.forget()

    def sync(self) -> None:
        """Hold the program until all state has arrived on the host."""
        self._store.sync()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state; its tensors on the host are those in use.

        Masters are not in it, as parameters are in no optimizer's state: see `masters_on_host`.
        """
        self._share()
        self.sync()
        return self.inner.state_dict()

    def masters_on_host(self) -> list[Tensor]:
        """Return the masters, in the order of the parameters, without a copy to the device."""
        self.sync()
        return [self._store.host(p, MASTER, p) for p in self._params()]

    def master_on_host(self, p: Tensor) -> Tensor:
        """Return the masters of one parameter, without a copy to the device."""
        self.sync()
        return self._store.host(p, MASTER, p)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take an inner optimizer's state; what moves goes to the host without the device.

        Floating tensors keep their dtype.

        Raises:
            ValueError: groups of other sizes.
        """
        loaded = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in self.param_groups]
        found = [len(g["params"]) for g in loaded]
        if sizes != found:
            raise ValueError(f"Streamed: state_dict: got groups of {found}, need {sizes}")
        self._share()
        self.sync()
        numbers = chain.from_iterable(g["params"] for g in loaded)
        for group, new in zip(self.param_groups, loaded, strict=True):
            group.update({k: copy.deepcopy(v) for k, v in new.items() if k != "params"})
            for p in group["params"]:
                self.state.pop(p, None)
                for key, value in state_dict["state"].get(next(numbers), {}).items():
                    self.state[p][key] = self._loaded(group, p, key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        if getattr(self, "param_groups", None) is self.inner.param_groups:
            self.inner.add_param_group(param_group)
        else:  # called by the constructor
            super().add_param_group(param_group)

    def host_nbytes(self) -> int:
        """Return the bytes on the host."""
        return self._store.nbytes

    def peak_bytes(self) -> int:
        """Return the most bytes that the state takes on the device in a step of all parameters."""
        held = [sum(self._nbytes(p) for p in part) for part in self._parts()]
        return peak(held, self.double_buffer)

    def _share(self) -> None:
        # Loading a state dict gives the inner optimizer new ones.
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _parts(self) -> list[list[Tensor]]:
        params = self._params()
        cut = bins([local(p).numel() for p in params], self.groups)
        return [[params[i] for i in indices] for indices in cut]

    def _nbytes(self, p: Tensor) -> int:
        state = sum(nbytes_of(t) for _, t in self._store.moved(p, self.state))
        return state + (nbytes_of(p) if self.masters is not None else 0)

    @contextmanager
    def _whole(self) -> Iterator[tuple[Groups, Groups]]:
        """Yield the groups and copies of them; then they have all their parameters again."""
        groups = list(self.inner.param_groups)
        kept = [dict(g) for g in groups]
        try:
            yield groups, kept
        finally:
            for group, whole in zip(groups, kept, strict=True):
                group["params"] = whole["params"]
            self.inner.param_groups[:] = groups

    def _stream(self, groups: Groups, kept: Groups) -> None:
        parts = self._parts()
        wanted = [[p for p in part if _has_gradient(p)] for part in parts]
        flights: dict[int, Event | None] = {}  # part -> its way in
        try:
            for number, part in enumerate(parts):
                self._bring(wanted, number, flights)
                _wait(flights.pop(number))
                self._update(groups, kept, part)
                self._publish(wanted[number])
                self._store.keep(wanted[number], self.state)
        except BaseException:
            for event in flights.values():
                _wait(event)
            self._send(self._params())
            raise
        self._store.let_go()

    def _bring(
        self, wanted: list[list[Tensor]], number: int, flights: dict[int, Event | None]
    ) -> None:
        """Start the way in of a part, and with two buffers of the next, into what is left free."""
        for coming in (number, number + 1) if self.double_buffer else (number,):
            if coming < len(wanted) and coming not in flights:
                self._store.let_go()
                flights[coming] = self._store.fetch(wanted[coming], self.state)

    def _update(self, groups: Groups, kept: Groups, part: list[Tensor]) -> None:
        """Let the inner optimizer see some parameters only, and each group as it was."""
        members = {id(p) for p in part}
        seen = []
        for group, whole in zip(groups, kept, strict=True):
            chosen = [p for p in whole["params"] if id(p) in members]
            if chosen:
                # An optimizer that counts steps in its groups would count each part.
                group.update({**whole, "params": chosen})
                seen.append(group)
        self.inner.param_groups[:] = seen
        self.inner.step()

    def _publish(self, params: list[Tensor]) -> None:
        if self.masters is not None:
            self.masters(params)

    def _send(self, params: list[Tensor]) -> None:
        self._store.keep(params, self.state)
        self._store.let_go()

    def _loaded(self, group: dict[str, Any], p: Tensor, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if self.residence == "host" and self._store.moves(p, key, value):
            part = local(value)
            return divided_as(self._store.host(p, key, part).copy_(part), p)
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        return value.detach().to(p.device if on_device else value.device, copy=True)


def _wait(event: Event | None) -> None:
    if event is not None:
        event.wait()


def _has_gradient(p: Tensor) -> bool:
    return p.grad is not None or getattr(p, "decoupled_grad", None) is not None
