"""Steps of AdamW in plain torch, one tensor after the other: the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Backend, Kernel


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
    time = step.double().reshape(())
    c1 = (1 - beta1**time if bias_correction else torch.ones_like(time)).to(params[0].dtype)
    c2 = (1 - beta2**time if bias_correction else torch.ones_like(time)).to(params[0].dtype)
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = -g if maximize else g
        g = g + weight_decay * p if mode == 0 else g
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        if max_exp_avg_sqs:
            v = max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], v))
        update = (m / c1) / ((v / c2).sqrt() + eps)
        update = update + weight_decay * p if mode == 1 else update
        p.copy_(p - lr * update)


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
    for ema, p in zip(emas, params, strict=True):
        ema.copy_(ema_decay * ema + (1 - ema_decay) * p)


BACKEND = Backend(
    "reference",
    100,
    {"fused_adamw_": Kernel(adamw), "fused_ema_adamw_": Kernel(ema_adamw)},
)
