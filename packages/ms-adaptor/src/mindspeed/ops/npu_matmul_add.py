"""`npu_matmul_add_fp32`, `npu_matmul_add_fp16`: a weight gradient added to its accumulator."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def npu_matmul_add_fp32(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """Add grad_output^T total_input to `grad`, which is fp32.

    Args:
        total_input: [T, K], the layer's input.
        grad_output: [T, N].
        grad: [N, K], changed in place; the product is not rounded to the inputs' dtype.
    """
    ms_ops.matmul_add_(grad, total_input, grad_output)


def npu_matmul_add_fp16(total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
    """Add grad_output^T total_input to `grad`, which has the inputs' dtype.

    Args:
        total_input: [T, K], the layer's input.
        grad_output: [T, N].
        grad: [N, K], changed in place.
    """
    ms_ops.matmul_add_(grad, total_input, grad_output)
