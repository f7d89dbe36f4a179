"""AdamW that keeps an exponential moving average of the weights.

ema = d ema + (1 - d) p after each step, with d = min(ema_decay, (1 + n) / (10 + n)) at update
n = 1, 2, ...

The average of a parameter starts as a copy of it before its first step. n is the groups' key
`num_updates` and so part of every state dict: a resumed run goes on with the decay that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import fail
from .adamw import fused_ema_adamw_
from .optimizers import FusedAdamW


class FusedEmaAdamW(FusedAdamW):
    """AdamW and an average of the weights, the state `ema_params`, in one `fused_ema_adamw_`.

    Args:
        params: fp32 or fp64 parameters, or groups of them.
        lr: learning rate, a number.
        ema_decay: decay of the averages, in [0, 1]; no state dict holds it.
        use_num_updates: warm the decay up: min(ema_decay, (1 + n) / (10 + n)) at update n.
        amsgrad: must be False.
        maximize: must be False.
        **options: as in `FusedAdamW`.

    Raises:
        TypeError: a parameter is neither fp32 nor fp64.
        ValueError: a number is out of range; amsgrad or maximize.
    """

    _fixed = (*FusedAdamW._fixed, "ema_decay", "use_num_updates")
    _counters = MappingProxyType({"num_updates": 0})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        ema_decay: float = 0.9999,
        use_num_updates: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        if not 0 <= ema_decay <= 1:
            fail(ValueError, type(self).__name__, "ema_decay", ema_decay, "a number in [0, 1]")
        self.ema_decay = ema_decay
        self.use_num_updates = use_num_updates
        self._stored: list[Tensor] | None = None
        super().__init__(params, lr, amsgrad=amsgrad, maximize=maximize, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose decay warms up on its own."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def decay(self, group: dict[str, Any]) -> float:
        """Return the decay of a group's newest update.

        Args:
            group: one of `param_groups`.
        """
        if not self.use_num_updates:
            return self.ema_decay
        n: int = group["num_updates"]
        return min(self.ema_decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def restart(self) -> None:
        """Start the averages at the weights as they are, and their warm-up with them."""
        for group in self.param_groups:
            group["num_updates"] = 0
            for parameter in group["params"]:
                if self.state.get(parameter):
                    self.state[parameter]["ema_params"].copy_(parameter)

    def store(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Keep a copy of the weights in host memory until `restore`.

        Args:
            parameters: other tensors than the optimizer's own, as many and in their order.

        Raises:
            RuntimeError: a copy is kept already.
        """
        if self._stored is not None:
            raise RuntimeError("store: weights are stored already, and nobody restored them")
        # A copy also where the host is the device.
        self._stored = [p.detach().to("cpu", copy=True) for p in self._targets(parameters)]

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the averages into the weights; a weight that has never moved stays as it is.

        Args:
            parameters: other tensors than the optimizer's own, as many and in their order, of any
                floating-point dtype.
        """
        for own, target in zip(self._targets(None), self._targets(parameters), strict=True):
            target.copy_(self.state[own]["ema_params"] if self.state.get(own) else own)

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Write the stored weights back, bit for bit.

        Args:
            parameters: what `store` was given.

        Raises:
            RuntimeError: nothing is stored.
        """
        if self._stored is None:
            raise RuntimeError("restore: nothing is stored: call store() first")
        for target, kept in zip(self._targets(parameters), self._stored, strict=True):
            target.copy_(kept)
        self._stored = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the optimizer's parameters hold the averages; afterwards, also after an error,
        their own values again.
        """
        self.store()
        try:
            self.copy_to()
            yield
        finally:
            self.restore()

    def _targets(self, parameters: Iterable[Tensor] | None) -> list[Tensor]:
        own = [p for group in self.param_groups for p in group["params"]]
        if parameters is None:
            return own
        given = list(parameters)
        if [p.shape for p in given] != [p.shape for p in own]:
            got = f"{len(given)} tensors of other shapes"
            fail(ValueError, type(self).__name__, "parameters", got, f"{len(own)}, as optimized")
        return given

    def _begin(self, group: dict[str, Any]) -> None:
        if self._stored is not None:
            raise RuntimeError("step: the weights are stored away: call restore() first")
        group["num_updates"] += 1

    def _new_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        return {**super()._new_state(group, parameter), "ema_params": _copy(parameter)}

    def _update(self, group: dict[str, Any], parameters: list[Tensor], step: Tensor) -> None:
        fused_ema_adamw_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            self._all(parameters, "exp_avg"),
            self._all(parameters, "exp_avg_sq"),
            self._all(parameters, "ema_params"),
            step,
            ema_decay=self.decay(group),
            **self._rates(group),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As the base's; a loaded state without averages starts them at the weights."""
        self.__dict__.setdefault("_stored", None)
        super().__setstate__(state)
        for group in self.param_groups:
            self._check(group)

    def _complete(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        super()._complete(group, parameter, state)
        if "ema_params" not in state:
            state["ema_params"] = _copy(parameter)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "maximize"):
            if group[name]:
                need = f"{name}=False: the averages are defined without; FusedAdamW has it"
                fail(ValueError, type(self).__name__, name, True, need)


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().clone(memory_format=torch.preserve_format)
