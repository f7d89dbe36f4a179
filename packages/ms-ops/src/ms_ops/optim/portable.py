"""Steps of AdamW on torch's own kernels.

torch's fused step serves contiguous fp32 and fp64 tensors on CPU and CUDA with bias correction,
which it always applies; its step counts from 1 as ours does. Everything else, and what is traced,
is torch's operators on lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..registry import Backend, Kernel

_FUSED_DEVICES = ("cpu", "cuda")


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    max_exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mode: int,
    bias_correction: bool,
    maximize: bool = False,
) -> None:
    """Change params, exp_avgs, exp_avg_sqs and max_exp_avg_sqs."""
    written = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if bias_correction and _fused(written):
        fused = torch._fused_adamw_ if mode == 1 else torch._fused_adam_
        count = step.to(torch.float32).reshape(())
        fused(
            params,
            [g.contiguous() for g in grads],
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            [count] * len(params),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=bool(max_exp_avg_sqs),
            maximize=maximize,
        )
        return
    corrections = _corrections(step, (beta1, beta2), params[0].dtype) if bias_correction else None
    decay = weight_decay if mode == 0 else 0.0
    steps = gradients(params, grads, decay, maximize)
    if mode == 1 and weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    _moments(steps, exp_avgs, exp_avg_sqs, beta1, beta2)
    if max_exp_avg_sqs:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    _update(params, exp_avgs, max_exp_avg_sqs or exp_avg_sqs, corrections, lr, eps)


def ema_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    step: Tensor,
    lr: float,
    ema_decay: float,
    *options: Any,
) -> None:
    """Change params, exp_avgs, exp_avg_sqs and emas; options as in `adamw`, without maximize."""
    adamw(params, grads, exp_avgs, exp_avg_sqs, step, [], lr, *options)
    torch._foreach_lerp_(emas, params, 1 - ema_decay)


def _fused(written: Sequence[list[Tensor]]) -> bool:
    """Whether torch's fused step takes these tensors, which it reads as flat memory."""
    first = written[0][0]
    # Functionalization refuses the fused step without amsgrad, whose list is empty then.
    if first.device.type not in _FUSED_DEVICES or isinstance(first, FunctionalTensor):
        return False
    return all(t.is_contiguous() for tensors in written for t in tensors)


def _corrections(
    step: Tensor, betas: tuple[float, float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return 1 - beta^step; through expm1, as 1 - 0.999^1 loses three digits."""
    time = step.to(dtype).reshape(())
    # log(0) is out of range: 0^step is 0.
    first, second = (
        -torch.expm1(time * math.log(beta)) if beta else torch.ones_like(time) for beta in betas
    )
    return first, second


def gradients(
    params: list[Tensor], grads: list[Tensor], decay: float, maximize: bool
) -> list[Tensor]:
    """Return the gradients turned to go up, and with a penalty, where that is asked for."""
    if maximize:
        grads = list(torch._foreach_neg(grads))
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads


def _moments(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)


def _update(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    squares: list[Tensor],
    corrections: tuple[Tensor, Tensor] | None,
    lr: float,
    eps: float,
) -> None:
    """Take lr (m / c1) / (sqrt(v / c2) + eps) off the weights."""
    roots = torch._foreach_sqrt(squares)
    if corrections is not None:
        first, second = corrections
        torch._foreach_div_(roots, second.sqrt())
        torch._foreach_add_(roots, eps)
        torch._foreach_mul_(roots, first)
    else:
        torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(params, exp_avgs, roots, -lr)


BACKEND = Backend(
    "portable",
    90,
    {"fused_adamw_": Kernel(adamw), "fused_ema_adamw_": Kernel(ema_adamw)},
)
