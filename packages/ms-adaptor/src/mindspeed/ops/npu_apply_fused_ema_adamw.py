"""`npu_apply_fused_ema_adamw`: one step of AdamW and of the average of the weights, in place."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def npu_apply_fused_ema_adamw(
    grad: Tensor,
    var: Tensor,
    m: Tensor,
    v: Tensor,
    s: Tensor,
    step: Tensor,
    lr: float = 1e-3,
    ema_decay: float = 0.9999,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    mode: int = 1,
    bias_correction: bool = True,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Change var, m, v and s by one step and return them.

    Args:
        grad: the gradient, fp32 (or fp64), any shape.
        var: the weights.
        m: first moment.
        v: second moment.
        s: the average of the weights.
        step: one element, the number of this step, the first is 1.
        lr: learning rate.
        ema_decay: decay of the average.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        mode: 1 for decoupled decay, 0 for an L2 penalty.
        bias_correction: divide the moments by 1 - beta^step.
        weight_decay: factor of the weights.
    """
    ms_ops.fused_ema_adamw_(
        var,
        grad,
        m,
        v,
        s,
        step,
        lr=lr,
        ema_decay=ema_decay,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        mode=mode,
        bias_correction=bias_correction,
    )
    return var, m, v, s
