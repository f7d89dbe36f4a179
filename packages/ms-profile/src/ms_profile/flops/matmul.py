"""FLOPs of matrix products and convolutions: one multiplication and one addition for each term.

[M, K] x [K, N] is 2 M K N. Where the second operand has N columns this is 2 N times the number of
elements of the first, whatever the batch, which is how grouped products are counted without
reading where their groups begin: rows that belong to no group count too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor


def product(self: Tensor, mat2: Tensor, **_: Any) -> int:
    """[..., M, K] x [..., K, N]."""
    return 2 * self.numel() * mat2.shape[-1]


def added_product(mat1: Tensor, mat2: Tensor, **_: Any) -> int:
    """[M, K] x [K, N] plus something."""
    return product(mat1, mat2)


def added_batch_product(batch1: Tensor, batch2: Tensor, **_: Any) -> int:
    """[B, M, K] x [B, K, N] plus something."""
    return product(batch1, batch2)


def matrix_vector(self: Tensor, **_: Any) -> int:
    """[M, K] x [K], and the dot product."""
    return 2 * self.numel()


def added_matrix_vector(mat: Tensor, **_: Any) -> int:
    """[M, K] x [K] plus something."""
    return 2 * mat.numel()


def added_outer(vec1: Tensor, vec2: Tensor, **_: Any) -> int:
    """[M] x [N] plus something."""
    return 2 * vec1.numel() * vec2.numel()


def products(self: Sequence[Tensor], mat2: Sequence[Tensor], **_: Any) -> int:
    """One product for each pair."""
    return sum(product(a, b) for a, b in zip(self, mat2, strict=True))


def linear(self: Tensor, weight: Tensor, **_: Any) -> int:
    """[..., K] x [N, K]^T."""
    return 2 * self.numel() * weight.shape[0]


def grouped(self: Tensor, mat2: Tensor, **_: Any) -> int:
    """Rows in groups [M, K] x [G, K, N], columns in groups [M, K] x [K, N], or a batch.

    With both operands flat the groups divide K: each element of the first meets N columns once.
    With a batch and a flat second operand the groups divide N: each matrix of the first meets its
    own columns, so that of all N columns each meets one matrix [M, K].
    """
    if self.dim() == 3 and mat2.dim() == 2:
        return 2 * self[0].numel() * mat2.shape[-1]
    return product(self, mat2)


def convolution(
    input: Tensor, weight: Tensor, transposed: bool = False, *, out_val: Any, **_: Any
) -> int:
    """2 N |positions| |weight|; a transposed one visits each input position."""
    return _convolution(input, weight, input if transposed else out_val)


def plain_convolution(self: Tensor, weight: Tensor, *, out_val: Any, **_: Any) -> int:
    """The kernels of one library, which are never transposed."""
    return _convolution(self, weight, out_val)


def _convolution(batch: Tensor, weight: Tensor, positions: Tensor) -> int:
    """The weight is [C_out, C_in / groups, ...] (transposed: [C_in, C_out / groups, ...])."""
    samples = batch.shape[0] if batch.dim() == weight.dim() else 1
    visited = prod(positions.shape[-(weight.dim() - 2) :])
    return 2 * samples * visited * weight.numel()


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
    transposed: bool = False,
    **_: Any,
) -> int:
    """As much as forward for the input's gradient, and once more for the weight's."""
    one = _convolution(input, weight, input if transposed else grad_output)
    return one * (bool(output_mask[0]) + bool(output_mask[1]))


FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mm": product,
    "aten::bmm": product,
    "aten::_int_mm": product,
    "aten::_scaled_mm": product,
    "aten::_scaled_mm_v2": product,
    "aten::addmm": added_product,
    "aten::addmm_": added_product,
    "aten::_addmm_activation": added_product,
    "aten::baddbmm": added_batch_product,
    "aten::baddbmm_": added_batch_product,
    "aten::addbmm": added_batch_product,
    "aten::addbmm_": added_batch_product,
    "aten::mv": matrix_vector,
    "aten::dot": matrix_vector,
    "aten::vdot": matrix_vector,
    "aten::addmv": added_matrix_vector,
    "aten::addmv_": added_matrix_vector,
    "aten::addr": added_outer,
    "aten::addr_": added_outer,
    "aten::_foreach_mm": products,
    "aten::mkldnn_linear": linear,
    "aten::_grouped_mm": grouped,
    "aten::_scaled_grouped_mm": grouped,
    "aten::_scaled_grouped_mm_v2": grouped,
    "aten::convolution": convolution,
    "aten::_convolution": convolution,
    "aten::convolution_overrideable": convolution,
    "aten::cudnn_convolution": plain_convolution,
    "aten::_slow_conv2d_forward": plain_convolution,
    "aten::convolution_backward": convolution_backward,
    "aten::convolution_backward_overrideable": convolution_backward,
}
