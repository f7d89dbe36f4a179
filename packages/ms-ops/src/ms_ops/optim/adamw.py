"""One step of AdamW, with or without an exponential moving average of the weights.

g = -g if maximize               g = g + wd p if mode is 0
m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
c1 = 1 - b1^step                 c2 = 1 - b2^step (both 1 without bias correction)
vmax = max(vmax, v)              in v's place below, with amsgrad
p = p - lr ((m / c1) / (sqrt(v / c2) + eps) + (wd p if mode is 1))
ema = d ema + (1 - d) p          of the new p
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import common_device
from ..opdef import OpDef, define_op
from ..registry import Facts

Tensors = Tensor | Sequence[Tensor]
DTYPES = (torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def fused_adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: Tensor,
    max_exp_avg_sqs: Tensors | None = None,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mode: int = 1,
    bias_correction: bool = True,
    maximize: bool = False,
) -> tuple[Tensors | None, ...]:
    """Take one step of AdamW in place.

    Args:
        params: the weights, a tensor or a list of them; fp32 or fp64, any shapes and strides.
        grads: their gradients, a list as long, of the same shapes and dtype; not changed.
        exp_avgs: first moments likewise.
        exp_avg_sqs: second moments likewise.
        step: one element, int32, int64, fp32 or fp64: the number of this step, the first is 1,
            on the device of params. It stays as it is; no call waits for its value.
        max_exp_avg_sqs: largest second moments so far; given, they turn amsgrad on.
        lr: learning rate.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: factor of the weights.
        mode: 1 takes lr * weight_decay * params off the weights (decoupled decay, AdamW), 0 adds
            weight_decay * params to the gradients (L2 penalty, Adam).
        bias_correction: divide the moments by 1 - beta^step.
        maximize: go up instead of down.

    Returns:
        params, exp_avgs, exp_avg_sqs and max_exp_avg_sqs as they were given. Not differentiable.

    Raises:
        TypeError: an argument that is no tensor or list of tensors, a dtype that does not fit.
        ValueError: lists of different lengths, shapes that do not match, a number out of range.
        RuntimeError: tensors on different devices.
    """
    options = (lr, beta1, beta2, eps, weight_decay, mode, bias_correction, maximize)
    args = _prepare_adamw(params, grads, exp_avgs, exp_avg_sqs, step, max_exp_avg_sqs, *options)
    with torch.no_grad():
        ADAMW(*args)
    return params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs


def fused_ema_adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Tensors,
    step: Tensor,
    *,
    lr: float = 1e-3,
    ema_decay: float = 0.9999,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mode: int = 1,
    bias_correction: bool = True,
) -> tuple[Tensors, ...]:
    """Take one step of AdamW in place, then move the averages towards the new weights.

    Args:
        params: the weights, a tensor or a list of them; fp32 or fp64, any shapes and strides.
        grads: their gradients, a list as long, of the same shapes and dtype; not changed.
        exp_avgs: first moments likewise.
        exp_avg_sqs: second moments likewise.
        emas: averages of the weights likewise; a copy of the weights before the first step.
        step: one element, the number of this step, as in `fused_adamw_`.
        lr: learning rate.
        ema_decay: decay of the averages, in [0, 1].
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: factor of the weights.
        mode: 1 for decoupled decay, 0 for an L2 penalty.
        bias_correction: divide the moments by 1 - beta^step.

    Returns:
        params, exp_avgs, exp_avg_sqs and emas as they were given. Not differentiable.

    Raises:
        TypeError: an argument that is no tensor or list of tensors, a dtype that does not fit.
        ValueError: lists of different lengths, shapes that do not match, a number out of range.
        RuntimeError: tensors on different devices.
    """
    options = (lr, ema_decay, beta1, beta2, eps, weight_decay, mode, bias_correction)
    args = _prepare_ema_adamw(params, grads, exp_avgs, exp_avg_sqs, emas, step, *options)
    with torch.no_grad():
        EMA_ADAMW(*args)
    return params, exp_avgs, exp_avg_sqs, emas


def _prepare_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: Tensor,
    max_exp_avg_sqs: Tensors | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mode: int = 1,
    bias_correction: bool = True,
    maximize: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "fused_adamw_"
    named = dict(zip(_NAMES, (params, grads, exp_avgs, exp_avg_sqs), strict=True))
    if max_exp_avg_sqs is not None:
        named["max_exp_avg_sqs"] = max_exp_avg_sqs
    lists = _lists(op, named, step)
    largest = lists[4] if max_exp_avg_sqs is not None else []
    check_options(op, lr, beta1, beta2, eps, weight_decay, mode)
    options = (lr, beta1, beta2, eps, weight_decay, mode, bias_correction, maximize)
    return *lists[:4], step, largest, *options


def _prepare_ema_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    emas: Tensors,
    step: Tensor,
    lr: float = 1e-3,
    ema_decay: float = 0.9999,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mode: int = 1,
    bias_correction: bool = True,
) -> tuple[Any, ...]:
    """Check the arguments and return those of the custom op."""
    op = "fused_ema_adamw_"
    named = dict(zip(_NAMES, (params, grads, exp_avgs, exp_avg_sqs), strict=True))
    lists = _lists(op, {**named, "emas": emas}, step)
    check_options(op, lr, beta1, beta2, eps, weight_decay, mode)
    if not 0 <= ema_decay <= 1:
        fail(ValueError, op, "ema_decay", ema_decay, "a number in [0, 1]")
    return *lists, step, lr, ema_decay, beta1, beta2, eps, weight_decay, mode, bias_correction


def _lists(op: str, named: dict[str, Tensors], step: Tensor) -> list[list[Tensor]]:
    """Return every argument as a list of tensors that fit each other."""
    lists = {name: _list(op, name, value) for name, value in named.items()}
    check_tensor(op, "step", step)
    check_float(op, "step", step, (*_INTEGERS, *DTYPES))
    if step.numel() != 1:
        fail(ValueError, op, "step", tuple(step.shape), "one element")
    params = lists["params"]
    if not params:
        fail(ValueError, op, "params", "an empty list", "one tensor or more")
    check_float(op, "params", params[0], DTYPES)
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            fail(ValueError, op, name, f"{len(tensors)} tensors", f"{len(params)}, as of params")
        for tensor, param in zip(tensors, params, strict=True):
            check_same_dtype(op, name, tensor, "params", params[0])
            if tensor.shape != param.shape:
                fail(ValueError, op, name, tuple(tensor.shape), f"{tuple(param.shape)}, of params")
    common_device(op, *(tensor for tensors in lists.values() for tensor in tensors), step)
    return list(lists.values())


def _list(op: str, name: str, value: Tensors) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        fail(TypeError, op, name, type(value).__name__, "a torch.Tensor or a list of them")
    for tensor in value:
        check_tensor(op, name, tensor)
    return list(value)


def check_options(
    op: str, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, mode: int
) -> None:
    """Raise ValueError unless every number is in its range."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            fail(ValueError, op, name, beta, "a number in [0, 1)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            fail(ValueError, op, name, value, "0 or more")
    check_choice(op, "mode", mode, (0, 1))


def _facts(params: list[Tensor], *_: Any) -> Facts:
    return Facts(params[0].device.type, params[0].dtype)


def _fake(*_: Any) -> None:
    return None


_LISTS = "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs"
_OPTIONS = "float beta1, float beta2, float eps, float weight_decay, int mode, bool bias_correction"

ADAMW = define_op(
    OpDef(
        name="fused_adamw_",
        family=str(__package__),
        prepare=_prepare_adamw,
        schema=f"{_LISTS}, Tensor step, Tensor(d!)[] max_exp_avg_sqs, float lr, {_OPTIONS}, "
        "bool maximize) -> ()",
        facts=_facts,
        fake=_fake,
        flops=None,
    )
)
EMA_ADAMW = define_op(
    OpDef(
        name="fused_ema_adamw_",
        family=str(__package__),
        prepare=_prepare_ema_adamw,
        schema=f"{_LISTS}, Tensor(d!)[] emas, Tensor step, float lr, float ema_decay, {_OPTIONS}) "
        "-> ()",
        facts=_facts,
        fake=_fake,
        flops=None,
    )
)
