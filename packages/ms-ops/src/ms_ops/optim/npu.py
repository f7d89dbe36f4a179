"""Steps of AdamW by torch_npu's fused step for lists, `aten::_fused_adamw_` on NPU tensors.

It always corrects the bias and takes contiguous tensors; everything else is torch's operators on
lists, and so are the averages. torch_npu has no fused step for an L2 penalty: the penalty is added
to the gradients first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .. import npu
from ..registry import Backend, Facts, Kernel
from . import portable


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
    lists = (params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if not bias_correction or not _serves([t for tensors in lists for t in tensors]):
        rest = (lr, beta1, beta2, eps, weight_decay, mode, bias_correction, maximize)
        portable.adamw(params, grads, exp_avgs, exp_avg_sqs, step, max_exp_avg_sqs, *rest)
        return
    if mode == 0:
        grads = portable.gradients(params, grads, weight_decay, maximize)
        weight_decay, maximize = 0.0, False
    count = step.to(torch.float32).reshape(())
    torch._fused_adamw_(
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


def _serves(written: list[Tensor]) -> bool:
    # Functionalization refuses the fused step without amsgrad, whose list is empty then.
    plain = not isinstance(written[0], FunctionalTensor)
    return plain and all(t.is_contiguous() and t.numel() for t in written)


def _supports(facts: Facts) -> str | None:
    return npu.declines(facts, (torch.float32,))


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {
        "fused_adamw_": Kernel(adamw, supports=_supports),
        "fused_ema_adamw_": Kernel(ema_adamw, supports=_supports),
    },
    npu.available,
)
