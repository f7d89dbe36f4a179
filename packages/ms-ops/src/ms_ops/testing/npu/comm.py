"""torch_npu's products with communication as documented, on torch's own groups of CPU tensors.

Products are summed in fp32 and rounded before they travel; what travels is summed in its dtype. A
communicator's name is that of the torch group: `named_groups` says so to our backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ...fused_comm.collectives import start_gather, start_scatter, sum_ranks
from ...fused_comm.groups import group_of
from ...fused_comm.npu import forget_name, note_name
from .require import need, need_contiguous

LOW = (torch.float16, torch.bfloat16)


@contextmanager
def named_groups(*groups: ProcessGroup) -> Iterator[None]:
    """Let the backend call these groups by torch's names instead of asking for HCCL's."""
    for group in groups:
        note_name(group, group.group_name)
    try:
        yield
    finally:
        for group in groups:
            forget_name(group)


def mm_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """Return the sum over the ranks of x1 x2 + bias + x3: both are inside the sum."""
    op = "npu_mm_all_reduce_base"
    _check(op, x1, x2, reduce_op, given)
    need(op, x1.dim() in (2, 3), "x1 of 2 or 3 dimensions")
    wide = x1.float() @ x2.float()
    wide = wide if bias is None else wide + bias.float()
    wide = wide if x3 is None else wide + x3.float()
    _ranks(op, x1, hcom, (1, 2, 4, 8))
    return sum_ranks(wide.to(x1.dtype), hcom)


def all_gather_mm(
    x: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    bias: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """Return ([x_0; x_1; ...] x2, the rows, of no elements unless they are asked for)."""
    op = "npu_all_gather_base_mm"
    _check(op, x, x2, "sum", given)
    need(op, bias is None and gather_index == 0, "no bias, the first factor gathered")
    _ranks(op, x, hcom, (2, 4, 8), world_size)
    rows = start_gather(x, hcom, world_size)()
    return (rows.float() @ x2.float()).to(x.dtype), rows if gather_output else x.new_empty(0)


def mm_reduce_scatter(
    x: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """Return the own rows of the sum over the ranks of x x2."""
    op = "npu_mm_reduce_scatter_base"
    _check(op, x, x2, reduce_op, given)
    need(op, bias is None and x.shape[0] % world_size == 0, "no bias, rows for every rank")
    _ranks(op, x, hcom, (2, 4, 8), world_size)
    return start_scatter((x.float() @ x2.float()).to(x.dtype), hcom, world_size)()


def _check(op: str, x1: Tensor, x2: Tensor, reduce_op: str, given: dict[str, Any]) -> None:
    need(op, x1.dtype in LOW and x2.dtype == x1.dtype, "fp16 or bf16 factors of one dtype")
    need(op, reduce_op == "sum", "reduce_op sum")
    need(op, all(not value for value in given.values()), "no quantisation")
    need(op, x1.numel() > 0 and x2.dim() == 2 and x2.numel() > 0, "factors that are not empty")
    need(op, x1.shape[-1] == x2.shape[0], "one inner dimension")
    need(op, 256 <= x1.shape[-1] < 65535, "an inner dimension from 256 to 65534")
    need_contiguous(op, x1)
    turned = x2.is_contiguous() or x2.t().is_contiguous()
    need(op, turned, "x2 contiguous or a transposed view")


def _ranks(
    op: str, x: Tensor, hcom: str, allowed: tuple[int, ...], size: int | None = None
) -> None:
    if x.device.type != "cpu":
        return
    ranks = group_of(hcom).size()
    need(op, ranks in allowed and size in (None, ranks), f"{allowed} ranks, all named")


KERNELS = {
    "npu::npu_all_gather_base_mm": all_gather_mm,
    "npu::npu_mm_all_reduce_base": mm_all_reduce,
    "npu::npu_mm_reduce_scatter_base": mm_reduce_scatter,
}
