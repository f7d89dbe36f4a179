"""`npu_mm_all_reduce_add_rms_norm_`: the same with the sum written into the residual."""

from __future__ import annotations

from torch import Tensor

from ms_ops import comm

from .npu_mm_all_reduce_add_rms_norm import arguments
from .process_groups import Group

OP = "npu_mm_all_reduce_add_rms_norm_"


def npu_mm_all_reduce_add_rms_norm_(
    x1: Tensor,
    x2: Tensor,
    residual: Tensor,
    gamma: Tensor,
    hcom: Group,
    reduce_op: str = "sum",
    epsilon: float = 1e-06,
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (residual, normed), for inference.

    Args:
        x1: as in `npu_mm_all_reduce_add_rms_norm`.
        x2: likewise.
        residual: [..., n], contiguous, written into.
        gamma: likewise.
        hcom: likewise.
        reduce_op: likewise.
        epsilon: likewise.
        bias: likewise.
        antiquant_scale: likewise.
        antiquant_offset: likewise.
        dequant_scale: likewise.
        antiquant_group_size: likewise.
        comm_turn: likewise.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: as there; a tensor that requires a gradient, a residual with strides.
    """
    scales = (antiquant_scale, antiquant_offset, dequant_scale, antiquant_group_size)
    args, kwargs = arguments(
        OP, (x1, x2, residual, gamma, hcom), reduce_op, epsilon, bias, scales, comm_turn
    )
    return comm.matmul_all_reduce_add_rms_norm_(*args, **kwargs)
