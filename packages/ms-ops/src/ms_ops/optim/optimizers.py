"""AdamW as a `torch.optim.Optimizer` on the fused step.

The state is that of `torch.optim.AdamW`: `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`) and a
`step` of each parameter in host memory. State dicts go both ways, and no step waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import check_float, fail
from .adamw import DTYPES, check_options, fused_adamw_

_Own = TypeVar("_Own", bound="FusedAdamW")


class FusedAdamW(torch.optim.Optimizer):
    """AdamW whose step is one `fused_adamw_` for all parameters of a group.

    Args:
        params: fp32 or fp64 parameters, or groups of them.
        lr: learning rate, a number.
        betas: decays of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: factor of the weights.
        bias_correction: divide the moments by 1 - beta^step.
        adam_w_mode: decoupled weight decay; False adds it to the gradients (Adam). A group's own is
            its key `decoupled_weight_decay`, torch's name.
        amsgrad: divide by the root of the largest second moment.
        maximize: go up instead of down.
        set_grad_none: `zero_grad()` drops gradients; False zeroes them.

    Raises:
        TypeError: a parameter is neither fp32 nor fp64.
        ValueError: a number is out of range.
    """

    # What the constructor decides and no state dict changes.
    _fixed: tuple[str, ...] = ("bias_correction", "set_grad_none")
    # What each group counts, part of every state dict.
    _counters: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        check_options(type(self).__name__, lr, *betas, eps, weight_decay, int(adam_w_mode))
        self.bias_correction = bias_correction
        self.set_grad_none = set_grad_none
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": adam_w_mode,
            **self._counters,
        }
        super().__init__(params, defaults)

    @classmethod
    def take_over(cls: type[_Own], optimizer: torch.optim.Optimizer, **options: Any) -> _Own:
        """Return an optimizer on the groups and the state of a torch Adam, which is then done with.

        Args:
            optimizer: a `torch.optim.AdamW` or `Adam`. Its groups and state are used, not copied.
            **options: further arguments of the constructor.
        """
        made = cls([{"params": []}], **options)
        made.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters count their own steps."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            check_float(type(self).__name__, "params", parameter, DTYPES)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the parameters that have a gradient.

        Args:
            closure: computes the loss again.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._begin(group)
            ready = [p for p in group["params"] if p.grad is not None]
            for count, parameters in self._counted(group, ready):
                step = torch.full((), count, dtype=torch.float32, device=parameters[0].device)
                self._update(group, parameters, step)
        return loss

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients, or zero them.

        Args:
            set_to_none: instead of the constructor's `set_grad_none`.
        """
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def create_states(self) -> None:
        """Give each parameter without one the state that its first step starts from.

        For loaders that fill states in place, and savers that want one before the first step.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state(group, parameter)

    def _state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state.update(self._new_state(group, parameter))
        return state

    def _new_state(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        state = {name: _zeros(parameter) for name in names}
        return {"step": torch.zeros((), dtype=torch.float32), **state}

    def _begin(self, group: dict[str, Any]) -> None:
        """Called for each group at each step, before its parameters move."""

    def _counted(
        self, group: dict[str, Any], parameters: Iterable[Tensor]
    ) -> list[tuple[float, list[Tensor]]]:
        """Count a step of each parameter; return those that go together, by their step."""
        together: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                fail(TypeError, type(self).__name__, "params", "a sparse gradient", "dense ones")
            step = self._state(group, parameter)["step"]
            step += 1
            key = (step.item(), parameter.device, parameter.dtype)
            together.setdefault(key, []).append(parameter)
        return [(key[0], found) for key, found in together.items()]

    def _update(self, group: dict[str, Any], parameters: list[Tensor], step: Tensor) -> None:
        largest = self._all(parameters, "max_exp_avg_sq") if group["amsgrad"] else None
        fused_adamw_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            self._all(parameters, "exp_avg"),
            self._all(parameters, "exp_avg_sq"),
            step,
            largest,
            maximize=group["maximize"],
            **self._rates(group),
        )

    def _all(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        return [self.state[p][name] for p in parameters]

    def _rates(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "lr": float(group["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "mode": int(group["decoupled_weight_decay"]),
            "bias_correction": self.bias_correction,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Torch's, and what the constructor decided."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._fixed}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and states as torch or another fused Adam wrote them."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for parameter in group["params"]:
                if self.state.get(parameter):
                    self._complete(group, parameter, self.state[parameter])

    def _complete(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        """Make a loaded state ours: a step of its own, in host memory."""
        # Fused Adams of others count in the group.
        count = float(state.get("step", group.get("step", 0)))
        state["step"] = torch.tensor(count, dtype=torch.float32)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = _zeros(parameter)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
