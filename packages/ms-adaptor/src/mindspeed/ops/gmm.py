"""`npu_gmm`, `npu_gmm_v2`: one matrix product for each group of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import ms_ops
from ms_ops.checks import check_choice, check_tensor, fail

Groups = Tensor | Sequence[int] | None


def npu_gmm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Groups = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """Multiply groups of rows, or sum over them.

    Args:
        x: [T, K]; with group_type 2 [K, T], usually a transposed view.
        weight: [E, K, N]; with group_type 2 [T, N].
        bias: [E, N], for group_type 0.
        group_list: [E], the row at which each group ends: a list of ints or an int64 tensor.
        group_type: 0 splits the rows, result [T, N]; 2 splits the summed dimension, result
            [E, K, N], not differentiable.
        gemm_fusion: backward adds the weight's gradient to `original_weight.main_grad` in fp32.
        original_weight: the parameter that `weight` is a view of, for `gemm_fusion`.

    Raises:
        TypeError: an argument that is no tensor, a dtype that does not fit.
        ValueError: another group_type, shapes that do not match, fusion without `main_grad`.
    """
    groups = {"offsets": group_list}
    return _gmm("npu_gmm", x, weight, bias, groups, group_type, gemm_fusion, original_weight)


def npu_gmm_v2(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Tensor | None = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """Do what `npu_gmm` does with the number of rows of each group in `group_list`, a tensor."""
    check_tensor("npu_gmm_v2", "group_list", group_list)
    groups = {"group_sizes": group_list}
    return _gmm("npu_gmm_v2", x, weight, bias, groups, group_type, gemm_fusion, original_weight)


def _gmm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: dict[str, Any],
    group_type: int,
    gemm_fusion: bool,
    original_weight: Tensor | None,
) -> Tensor:
    check_choice(op, "group_type", group_type, (0, 2))
    if group_type == 2:
        return _sum_over_groups(op, x, weight, groups)
    if not gemm_fusion:
        return ms_ops.grouped_matmul(x, weight, bias=bias, **groups)
    main_grad = getattr(original_weight, "main_grad", None)
    if main_grad is None or original_weight is None:
        fail(ValueError, op, "original_weight", original_weight, "a parameter with main_grad")
    if hasattr(original_weight, "grad_added_to_main_grad"):
        weight = AddedToMainGrad.apply(weight, original_weight)  # type: ignore[no-untyped-call]
    return ms_ops.grouped_matmul(x, weight, bias=bias, accumulate_into=main_grad, **groups)


def _sum_over_groups(op: str, x: Tensor, dy: Tensor, groups: dict[str, Any]) -> Tensor:
    (ends,) = groups.values()
    if ends is None or x.requires_grad or dy.requires_grad:
        need = "a group list, and tensors without gradients"
        fail(ValueError, op, "group_type", 2, need)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    total = torch.zeros((len(ends), x.shape[0], dy.shape[1]), dtype=wide, device=x.device)
    return ms_ops.grouped_matmul_add_(total, x.t(), dy, **groups).to(x.dtype)


class AddedToMainGrad(torch.autograd.Function):
    """The weight itself; backward says that its gradient is in `main_grad` already.

    Megatron's data-parallel hooks wait for a gradient on the parameter; the one that they get here
    is of no value, as Megatron's own linear layer returns it: zeros when `zero_out_wgrad` asks for
    that, else uninitialised.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, original: Tensor) -> Tensor:
        """Return a view of the weight."""
        ctx.set_materialize_grads(False)
        ctx.original, ctx.shape = original, weight.shape
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        """Set the mark and return the placeholder."""
        original = ctx.original
        original.grad_added_to_main_grad = True
        make = torch.zeros if getattr(original, "zero_out_wgrad", False) else torch.empty
        return make(ctx.shape, dtype=original.dtype, device=original.device), None
