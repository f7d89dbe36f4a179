"""`npu_mm_all_reduce_add_rms_norm`: product, sum over the ranks, residual and norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ms_ops import comm
from ms_ops.checks import check_tensor, fail
from ms_ops.device import LOW_PRECISION

from .process_groups import Group, check_reduction, resolved, summed

OP = "npu_mm_all_reduce_add_rms_norm"


def npu_mm_all_reduce_add_rms_norm(
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
    """Return (y, normed), see `ms_ops.comm.matmul_all_reduce_add_rms_norm`.

    Args:
        x1: [..., k], fp16, bf16, fp32 or fp64.
        x2: [k, n] in x1's dtype, or int8 with 16-bit x1: its columns are scaled first.
        residual: [..., n].
        gamma: [n], the norm's weight.
        hcom: a process group, or the name of one.
        reduce_op: "sum".
        epsilon: added to the mean square.
        bias: [n], inside of the sum: every rank's own is added.
        antiquant_scale: [1], [n], [1, n] or [ceil(k / antiquant_group_size), n] in x1's dtype, for
            int8 x2.
        antiquant_offset: likewise, added to x2 before it is scaled.
        dequant_scale: refused: 8-bit x1 is not served.
        antiquant_group_size: rows of x2 that share a scale; 0: all.
        comm_turn: 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not match, another reduction, scales without int8 x2.
    """
    scales = (antiquant_scale, antiquant_offset, dequant_scale, antiquant_group_size)
    args, kwargs = arguments(
        OP, (x1, x2, residual, gamma, hcom), reduce_op, epsilon, bias, scales, comm_turn
    )
    return comm.matmul_all_reduce_add_rms_norm(*args, **kwargs)


def arguments(
    op: str,
    given: tuple[Tensor, Tensor, Tensor, Tensor, Group],
    reduce_op: str,
    epsilon: float,
    bias: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    comm_turn: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check what is peculiar to the old form and return what the new one takes."""
    x1, x2, residual, gamma, hcom = given
    check_reduction(op, reduce_op, comm_turn)
    check_tensor(op, "x1", x1)
    check_tensor(op, "x2", x2)
    group = resolved(op, "hcom", hcom)
    if x1.dtype is torch.int8 or scales[2] is not None:
        fail(ValueError, op, "dequant_scale", "8-bit x1 or its scale", "x1 in floating point")
    if x2.dtype is torch.int8:
        x2 = _dequantised(op, x1, x2, *scales[:2], scales[3])
    elif scales[0] is not None or scales[1] is not None or scales[3]:
        fail(ValueError, op, "antiquant_scale", "scales", "none, or x2 in int8")
    kwargs = {"eps": epsilon, "bias": summed(bias, group)}
    return (x1, x2, residual, gamma, group), kwargs


def _dequantised(
    op: str,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    group_size: int,
) -> Tensor:
    if scale is None or x1.dtype not in LOW_PRECISION:
        need = "a scale beside int8 x2, and x1 in fp16 or bf16"
        fail(ValueError, op, "antiquant_scale", "none" if scale is None else x1.dtype, need)
    wide = x2.to(torch.float32)
    if offset is not None:
        wide = wide + _rows(op, "antiquant_offset", offset, x1, x2, group_size)
    return (wide * _rows(op, "antiquant_scale", scale, x1, x2, group_size)).to(x1.dtype)


def _rows(op: str, name: str, scale: Tensor, x1: Tensor, x2: Tensor, group_size: int) -> Tensor:
    """Return a scale that broadcasts over the rows of x2."""
    rows, columns = x2.shape
    if scale.dtype != x1.dtype:
        fail(TypeError, op, name, scale.dtype, f"{x1.dtype}, the dtype of x1")
    if not group_size:
        allowed: tuple[tuple[int, ...], ...] = ((1,), (columns,), (1, columns))
    else:
        if group_size % 32 or not 32 <= group_size < rows:
            need = f"a multiple of 32 below {rows}, the rows of x2"
            fail(ValueError, op, "antiquant_group_size", group_size, need)
        allowed = ((-(-rows // group_size), columns),)
    if tuple(scale.shape) not in allowed:
        fail(ValueError, op, name, tuple(scale.shape), f"one of {allowed}")
    wide = scale.to(torch.float32)
    return wide.repeat_interleave(group_size, 0)[:rows] if group_size else wide
