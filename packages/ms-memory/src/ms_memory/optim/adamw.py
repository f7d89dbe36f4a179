"""AdamW on bf16 parameters whose fp32 masters are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ms_ops import fused_adamw_

from ..errors import refuse
from .bits import Rounding
from .packed import PackedMaster, Slice
from .shards import divided_as, local

_MOMENTS = ("exp_avg", "exp_avg_sq")


class PackedAdamW(torch.optim.Optimizer):
    """AdamW in 12 bytes a parameter: weight 2, residue 2, two fp32 moments of 4.

    Each step joins the masters of a block, updates them as `ms_ops.fused_adamw_` does, and splits
    them again, so that no whole fp32 copy exists. The trajectory is that of AdamW on fp32 masters
    whose bf16 copies are rounded the same way, bit for bit.

    The gradient of a parameter is its `decoupled_grad` (any floating dtype) where it has one, else
    `grad`. State dicts hold plain fp32 masters and moments, so that they load into another layout
    of ranks, the other rounding, or an ordinary optimizer.

    A group whose key `decoupled_weight_decay` (torch's name) is False decays as Adam does.

    Args:
        params: bf16 parameters or groups of them; see `PackedMaster`.
        lr: learning rate.
        betas: decays of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the masters.
        rounding: "rna" or "rne", see `PackedMaster`.
        state_dtype: dtype of the moments between steps, fp32 or bf16 (then not bit-exact).
        block: elements whose masters exist in fp32 at one time; None: what suits the device.
        masters_apart: state dicts hold no masters, for formats that keep them in a place of their
            own: `master` and `set_master` read and write them.

    Raises:
        MemoryFeatureError: E-M40, see `PackedMaster`; E-M42, a state dict without masters.
        ValueError: a number out of range, or another state dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "rna",
        state_dtype: torch.dtype = torch.float32,
        block: int | None = None,
        masters_apart: bool = False,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"PackedAdamW: state_dtype: got {state_dtype}, need torch.float32 or torch.bfloat16"
            )
        self.rounding: Rounding = rounding
        self.state_dtype = state_dtype
        self.block = block
        self.masters_apart = masters_apart
        self.packed: list[PackedMaster] = []
        self._places: dict[Tensor, tuple[PackedMaster, int]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its masters start as its weights."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        packed = PackedMaster(group["params"], rounding=self.rounding, block=self.block)
        self.packed.append(packed)
        self._places.update({p: (packed, index) for index, p in enumerate(group["params"])})

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
        for group, packed in zip(self.param_groups, self.packed, strict=True):
            for count, chosen in self._counted(group["params"]).items():
                for run in packed.runs(chosen):
                    self._update(group, packed, run, count)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups and, for each parameter that has stepped, step, moments and its master.

        The masters of all parameters are there, also of those without a step, in fp32; with
        `masters_apart` none is.
        """
        groups, number = [], 0
        # What belongs to no parameter keeps its key, as in torch's own.
        state: dict[Any, Any] = {k: v for k, v in self.state.items() if not isinstance(k, Tensor)}
        for group in self.param_groups:
            indices = range(number, number + len(group["params"]))
            number += len(indices)
            rest = {k: v for k, v in group.items() if k != "params"}
            groups.append({**rest, "params": list(indices)})
            for p, index in zip(group["params"], indices, strict=True):
                state[index] = dict(self.state.get(p, {}))
                if not self.masters_apart:
                    state[index]["master"] = self.master(p)
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups, steps, moments and masters; the weights follow from the masters.

        Raises:
            MemoryFeatureError: E-M42, a parameter without a master.
            ValueError: groups of other sizes.
        """
        sizes = [len(g["params"]) for g in self.param_groups]
        found = [len(g["params"]) for g in state_dict["param_groups"]]
        if sizes != found:
            raise ValueError(f"PackedAdamW: state_dict: got groups of {found}, need {sizes}")
        for index, kept in state_dict["state"].items():
            if "master" not in kept and not self.masters_apart:
                remedy = "call adopt_weights() to start from the weights, and load the rest alone"
                refuse("E-M42", f"parameter {index}", remedy)
        numbers = iter(sorted(n for g in state_dict["param_groups"] for n in g["params"]))
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in loaded.items() if k != "params"})
            for p in group["params"]:
                self._load(p, state_dict["state"].get(next(numbers), {}))

    def master(self, p: Tensor) -> Tensor:
        """Return a copy of the masters of a parameter, fp32 in its shape."""
        packed, index = self._places[p]
        return packed.master(index)

    def set_master(self, p: Tensor, master: Tensor) -> None:
        """Store the masters of a parameter, of its shape; its weights follow from them."""
        packed, index = self._places[p]
        packed.set_master(index, master.to(p.device))

    def create_states(self) -> None:
        """Give each parameter without one the state that its first step starts from."""
        for p in self._places:
            self._state(p)

    def adopt_weights(self) -> None:
        """Take the weights as the masters, after weights were loaded without this optimizer."""
        for packed in self.packed:
            packed.adopt_weights()

    def nbytes(self) -> int:
        """Return the bytes held beside weights and gradients."""
        moments = (t for s in self.state.values() for k, t in s.items() if k in _MOMENTS)
        held = sum(int(local(t).numel() * t.element_size()) for t in moments)
        return held + sum(packed.nbytes() for packed in self.packed)

    def _load(self, p: Tensor, kept: dict[str, Any]) -> None:
        self.state.pop(p, None)
        if "step" in kept:
            state = self._state(p)
            state["step"] = torch.as_tensor(kept["step"], dtype=torch.float32).clone()
            for name in _MOMENTS:
                local(state[name]).copy_(local(kept[name]))
        if "master" in kept:
            self.set_master(p, kept["master"])

    def _state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in _MOMENTS:
                zeros = torch.zeros(local(p).shape, dtype=self.state_dtype, device=p.device)
                state[name] = divided_as(zeros, p)
        return state

    def _counted(self, params: list[Tensor]) -> dict[float, list[int]]:
        """Count a step of each parameter with a gradient; return them by their step."""
        together: dict[float, list[int]] = {}
        for index, p in enumerate(params):
            if _gradient(p) is None or not local(p).numel():
                continue
            step = self._state(p)["step"]
            step += 1
            together.setdefault(step.item(), []).append(index)
        return together

    def _update(
        self, group: dict[str, Any], packed: PackedMaster, run: list[Slice], count: float
    ) -> None:
        params = [group["params"][piece.index] for piece in run]
        joined = packed.join(run)
        masters = list(joined.split([piece.numel for piece in run]))
        grads = [_flat(_gradient(p), s).float() for p, s in zip(params, run, strict=True)]
        kept = {
            name: [_flat(self.state[p][name], s) for p, s in zip(params, run, strict=True)]
            for name in _MOMENTS
        }
        wide = {name: [t.float() for t in found] for name, found in kept.items()}
        beta1, beta2 = group["betas"]
        fused_adamw_(
            masters,
            grads,
            wide["exp_avg"],
            wide["exp_avg_sq"],
            torch.full((), count, dtype=torch.float32, device=joined.device),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            mode=int(group.get("decoupled_weight_decay", True)),
        )
        packed.split_(run, joined)
        if self.state_dtype is not torch.float32:
            for name in _MOMENTS:
                torch._foreach_copy_(kept[name], wide[name])


def _gradient(p: Tensor) -> Tensor | None:
    decoupled: Tensor | None = getattr(p, "decoupled_grad", None)
    return p.grad if decoupled is None else decoupled


def _flat(tensor: Tensor | None, piece: Slice) -> Tensor:
    assert tensor is not None
    return local(tensor.detach()).reshape(-1)[piece.start : piece.stop]
