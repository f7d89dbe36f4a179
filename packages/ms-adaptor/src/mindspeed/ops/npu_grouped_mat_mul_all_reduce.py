"""`npu_grouped_mat_mul_all_reduce`: lists of products, each summed over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ms_ops import comm
from ms_ops.checks import check_choice, fail

from .process_groups import Group, check_reduction, resolved, summed

OP = "npu_grouped_mat_mul_all_reduce"
MOST = 64


def npu_grouped_mat_mul_all_reduce(
    x: list[Tensor],
    weight: list[Tensor],
    hcomm: Group,
    *,
    bias: list[Tensor] | None = None,
    group_list: list[int] | None = None,
    split_item: int = 0,
    reduce_op: str = "sum",
    comm_turn: int = 0,
) -> list[Tensor]:
    """Return the sums over the ranks of x_i W_i + bias_i.

    Args:
        x: up to 64 tensors [rows, K]; one for split_item 1 and 3.
        weight: as many matrices [K, N]; for split_item 3 also one [E, K, N].
        hcomm: a process group, or the name of one.
        bias: a tensor [N] for each matrix, inside of the sum: every rank's own is added.
        group_list: for split_item 1 and 3, the row of x at which each group ends.
        split_item: 0 a result for each pair; 1 for each group of rows of the one x; 2 the pairs'
            results as one tensor; 3 the groups' as one.
        reduce_op: "sum".
        comm_turn: 0.

    Returns:
        The results, differentiable.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: lists that do not fit split_item, shapes that do not match.
    """
    check_choice(OP, "split_item", split_item, (0, 1, 2, 3))
    check_reduction(OP, reduce_op, comm_turn)
    group = resolved(OP, "hcomm", hcomm)
    rows, matrices = _parts(x, weight, group_list, split_item)
    if bias is not None and len(bias) != len(matrices):
        fail(ValueError, OP, "bias", f"{len(bias)} tensors", f"{len(matrices)}, as many as weight")
    biases: Sequence[Tensor | None] = bias or [None] * len(matrices)
    results = [
        comm.matmul_all_reduce(a, b, group, bias=summed(row, group))
        for a, b, row in zip(rows, matrices, biases, strict=True)
    ]
    return results if split_item < 2 else [torch.cat(results)]


def _parts(
    x: list[Tensor], weight: list[Tensor], group_list: list[int] | None, split_item: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return the pairs of factors."""
    if not 0 < max(len(x), len(weight)) <= MOST:
        fail(ValueError, OP, "x", f"{len(x)} and {len(weight)} tensors", f"1 to {MOST} of each")
    if split_item in (0, 2):
        if group_list is not None or len(x) != len(weight):
            need = "no group_list and as many matrices as x with split_item 0 and 2"
            fail(ValueError, OP, "group_list", group_list, need)
        return x, weight
    if group_list is None or len(x) != 1:
        need = "a list and one x with split_item 1 and 3"
        fail(ValueError, OP, "group_list", group_list, need)
    matrices: Sequence[Tensor] = weight
    if split_item == 3 and len(weight) == 1 and weight[0].dim() == 3:
        matrices = weight[0].unbind(0)
    ends = [0, *group_list]
    if len(group_list) != len(matrices) or ends != sorted(ends) or ends[-1] != x[0].shape[0]:
        need = f"{len(matrices)} ends that rise to {x[0].shape[0]}, the rows of x"
        fail(ValueError, OP, "group_list", group_list, need)
    return [x[0][start:end] for start, end in pairwise(ends)], matrices
