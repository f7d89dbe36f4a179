"""The grouped products of Megatron's experts on ms_ops, in the place of the grouped_gemm package.

`PRODUCTS` and `ACCUMULATING` hold what Megatron's experts use of `grouped_gemm_util`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import ms_ops
from mindspeed.ops.gmm import npu_gmm_v2


def product(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiply each group of rows of `a` by its own matrix.

    Args:
        a: [T, K], rows sorted by group.
        b: [G, K, N], or [G, N, K] with `trans_b`.
        batch_sizes: [G], rows of each group, on any device.
        trans_b: transpose the matrices of `b`.

    Returns:
        [T, N] in a's dtype.
    """
    return ms_ops.grouped_matmul(a, b, group_sizes=batch_sizes, transpose_weight=trans_b)


def accumulating(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Like `product`, but backward adds the gradient of `b` to its parameter's `main_grad`.

    Args:
        a: [T, K].
        b: a view of a whole parameter, as Megatron's experts make it.
        batch_sizes: [G].
        trans_b: must be False.

    Raises:
        ValueError: `b` is not a view of a parameter with `main_grad`, or `trans_b` is true.
    """
    if not (torch.is_grad_enabled() and b.requires_grad):
        return product(a, b, batch_sizes, trans_b)
    parameter = b._base
    whole = parameter is not None and parameter.is_leaf and parameter.numel() == b.numel()
    if trans_b or not whole or not hasattr(parameter, "main_grad"):
        raise ValueError(
            "gemm_gradient_accumulation_fusion: b: got a tensor that is no view of a parameter with"
            " main_grad, need the weights of Megatron's experts under its data-parallel wrapper"
        )
    return npu_gmm_v2(
        a, b, group_list=batch_sizes.to(torch.int64), gemm_fusion=True, original_weight=parameter
    )


def assert_available() -> None:
    """Nothing to assert: no package is needed."""


def _util(gmm: Callable[..., Tensor]) -> SimpleNamespace:
    return SimpleNamespace(
        ops=SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=assert_available
    )


PRODUCTS = _util(product)
ACCUMULATING = _util(accumulating)
