"""`npu_groupmatmul_add_fp32`: weight gradients of groups of rows added to their accumulators."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def npu_groupmatmul_add_fp32(x: Tensor, dy: Tensor, grouplist: Tensor, grad: Tensor) -> None:
    """Add x^T dy of each group of rows to its part of `grad`.

    Args:
        x: [T, K].
        dy: [T, N].
        grouplist: [E] ints, the row at which each group ends.
        grad: fp32, [E, K, N] or any contiguous shape of as many elements; changed in place.
    """
    ms_ops.grouped_matmul_add_(grad, x, dy, grouplist)
