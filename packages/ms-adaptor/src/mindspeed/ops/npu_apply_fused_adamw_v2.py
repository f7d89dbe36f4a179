"""`npu_apply_fused_adamw_v2`: one step of AdamW on one tensor, in place."""

from __future__ import annotations

from torch import Tensor

import ms_ops
from ms_ops.checks import check_tensor


def npu_apply_fused_adamw_v2(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    state_step: Tensor,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    """Change param and its moments by one step with decoupled decay and bias correction.

    Args:
        param: the weights, fp32 (or fp64), any shape.
        grad: their gradient.
        exp_avg: first moment.
        exp_avg_sq: second moment.
        max_exp_avg_sq: largest second moment, changed with amsgrad; else not looked at.
        state_step: one element, the number of this step, the first is 1.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        weight_decay: factor of the weights.
        eps: added to the root of the second moment.
        amsgrad: divide by the root of the largest second moment.
        maximize: go up instead of down.
    """
    largest = None
    if amsgrad:
        check_tensor("npu_apply_fused_adamw_v2", "max_exp_avg_sq", max_exp_avg_sq)
        largest = max_exp_avg_sq
    ms_ops.fused_adamw_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        state_step,
        largest,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )
