"""FLOPs of torch_npu's fused operators, by name: nothing here needs torch_npu.

Argument names are those of torch_npu's schemas. Lengths that an operator takes as a list of numbers
are used as they are; lengths on the device are kept and read with the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .attention import (
    CAUSAL,
    CAUSAL_LOWER_RIGHT,
    DENSE,
    Attention,
    Lengths,
    Mask,
    Pending,
    Shape,
    backward_flops,
    forward_flops,
    packed,
)
from .matmul import convolution, convolution_backward, linear, product

# Layout letters to the positions of batch, heads and sequence; H alone is heads times channels.
_LAYOUTS = {"BSND": (0, 2, 1), "BNSD": (0, 1, 2), "BSH": (0, None, 1), "SBH": (1, None, 0)}

_UNBOUNDED = 2**31 - 1


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    backward: bool = False,
    attention: Attention,
    query_rope: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | Tensor | None = None,
    actual_seq_kvlen: Sequence[int] | Tensor | None = None,
    **options: Any,
) -> int | Pending:
    """`npu_fusion_attention`, v2, v3 and their gradients.

    Args:
        query: in `input_layout`: BSND, BNSD, BSH, SBH, or TND, where lengths end each sequence.
        key: likewise; its heads may be a divisor of the query's.
        value: likewise.
        head_num: heads of the query.
        input_layout: see above.
        backward: count the gradients.
        attention: which entries count, see `ms_profile.flops.attention`.
        query_rope: further channels of the query, as v2 takes them.
        actual_seq_qlen: TND: running sums of the query lengths.
        actual_seq_kvlen: TND: running sums of the key lengths.
        **options: masks, see `_masks`.
    """
    count = backward_flops if backward else forward_flops

    def total(shape: Shape, found: list[Lengths]) -> int:
        masks = _masks(len(found), **options)
        each = zip(found, masks, strict=True)
        return sum(count(shape, [lengths], mask, attention) for lengths, mask in each)

    extra = 0 if query_rope is None else query_rope.shape[-1]
    if input_layout == "TND":
        shape = Shape(head_num, query.shape[-1] + extra, value.shape[-1])
        return _from_ends(partial(total, shape), actual_seq_qlen, actual_seq_kvlen)
    if input_layout not in _LAYOUTS:
        raise ValueError(f"input_layout {input_layout!r} must be one of {[*_LAYOUTS, 'TND']}")
    batch_at, heads_at, sequence_at = _LAYOUTS[input_layout]
    batch, rows, keys = query.shape[batch_at], query.shape[sequence_at], key.shape[sequence_at]
    if heads_at is None:
        channels = query.shape[-1] // head_num
        groups = key.shape[-1] // channels
        shape = Shape(head_num, channels + extra, value.shape[-1] // groups)
    else:
        shape = Shape(head_num, query.shape[-1] + extra, value.shape[-1])
    return total(shape, [Lengths(rows, keys)] * batch)


def _from_ends(
    total: Callable[[list[Lengths]], int],
    ends_q: Sequence[int] | Tensor | None,
    ends_k: Sequence[int] | Tensor | None,
) -> int | Pending:
    if ends_q is None or ends_k is None:
        raise ValueError("layout TND needs actual_seq_qlen and actual_seq_kvlen")
    if isinstance(ends_q, Tensor) and isinstance(ends_k, Tensor):
        # The ends lack the leading zero of starts: the first sequence is added by hand.
        zero = ends_q.new_zeros(1)
        return packed(total, _joined(zero, ends_q), _joined(zero, ends_k))
    starts = [[0, *map(int, ends)] for ends in (ends_q, ends_k)]
    pairs = zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False)
    return total([Lengths(q1 - q0, k1 - k0) for q0, q1, k0, k1 in pairs])


def _joined(zero: Tensor, ends: Tensor) -> Tensor:
    import torch

    return torch.cat([zero, ends])


def _masks(
    number: int,
    *,
    sparse_mode: int = 0,
    atten_mask: Tensor | None = None,
    pre_tockens: int = _UNBOUNDED,
    next_tockens: int = _UNBOUNDED,
    pre_tokens: int | None = None,
    next_tokens: int | None = None,
    prefix: Sequence[int] | None = None,
    **_: Any,
) -> list[Mask]:
    """The mask of each sequence or sample.

    Modes: 0 a band from the upper left, when there is a mask; 1 whatever the mask says; 2 and 3
    causal, upper left and lower right; 4 a band from the lower right; 5 and 6 causal plus a prefix;
    7 and 8 causal with a band in the last or the first sequence, for packs cut across ranks.
    """
    bounds = (
        pre_tockens if pre_tokens is None else pre_tokens,
        next_tockens if next_tokens is None else next_tokens,
    )
    left, right = (None if bound >= _UNBOUNDED else bound for bound in bounds)
    band = Mask(left, right, "lower_right")
    if sparse_mode == 0:
        return [DENSE if atten_mask is None else Mask(left, right, "upper_left")] * number
    if sparse_mode in (5, 6):
        wide = list(prefix or [0] * number)
        return [Mask(None, 0, "lower_right", keys) for keys in wide]
    if sparse_mode == 7:
        return [CAUSAL_LOWER_RIGHT] * (number - 1) + [band]
    if sparse_mode == 8:
        return [Mask(left, right, "upper_left")] + [CAUSAL] * (number - 1)
    single = {1: DENSE, 2: CAUSAL, 3: CAUSAL_LOWER_RIGHT, 4: band}
    if sparse_mode not in single:
        raise ValueError(f"sparse_mode {sparse_mode} must be 0 to 8")
    return [single[sparse_mode]] * number


def grouped_matmul(x: Sequence[Tensor], weight: Sequence[Tensor], **_: Any) -> int:
    """`npu_grouped_matmul`: each row of x meets the columns of one weight."""
    if len(x) == len(weight):
        return sum(product(rows, each) for rows, each in zip(x, weight, strict=True))
    # One x for all weights, or one stacked weight for all x: the weights have equal columns.
    return sum(product(rows, weight[0]) for rows in x)


def grouped_add(x: Tensor, weight: Tensor, transpose_weight: bool = False, **_: Any) -> int:
    """`npu_grouped_matmul_add_`: the weight gradients of grouped rows."""
    return 2 * x.numel() * weight.shape[-2 if transpose_weight else -1]


def matmul_add(x: Tensor, weight: Tensor, C: Tensor, **_: Any) -> int:
    """`_npu_matmul_add_fp32`: C [M, N] += x^T weight."""
    del weight
    return 2 * x.numel() * C.shape[-1]


def matmul_reduced(x1: Tensor, x2: Tensor, **_: Any) -> int:
    """`npu_mm_all_reduce_base`, `npu_quant_matmul`: this rank's own product."""
    return product(x1, x2)


def gathered_matmul(input: Tensor, x2: Tensor, world_size: int, **_: Any) -> int:
    """`npu_all_gather_base_mm`: the rows of all ranks."""
    return product(input, x2) * world_size


def linear_backward(grad: Tensor, input: Tensor, weight: Tensor, **_: Any) -> int:
    """`npu_linear_backward`: the gradients of both operands."""
    del grad
    return 2 * linear(input, weight)


def matmul_scattered(input: Tensor, x2: Tensor, **_: Any) -> int:
    """`npu_mm_reduce_scatter_base`: this rank's product before the sum."""
    return product(input, x2)


def exchanged_grouped(
    gmm_x: Tensor, gmm_weight: Tensor, recv_counts: Sequence[int], **options: Any
) -> int:
    """`npu_alltoallv_gmm`: the rows that arrive, and a dense product beside them."""
    rows = sum(recv_counts)
    return 2 * rows * gmm_x.shape[-1] * _columns(gmm_weight, options) + _beside(**options)


def grouped_exchanged(gmm_x: Tensor, gmm_weight: Tensor, **options: Any) -> int:
    """`npu_gmm_alltoallv`: this rank's rows, and a dense product beside them."""
    return 2 * gmm_x.numel() * _columns(gmm_weight, options) + _beside(**options)


def _columns(weight: Tensor, options: dict[str, Any]) -> int:
    return weight.shape[-2 if options.get("trans_gmm_weight") else -1]


def _beside(
    mm_x: Tensor | None = None,
    mm_weight: Tensor | None = None,
    trans_mm_weight: bool = False,
    **_: Any,
) -> int:
    if mm_x is None or mm_weight is None:
        return 0
    return 2 * mm_x.numel() * mm_weight.shape[-2 if trans_mm_weight else -1]


def feed_forward(x: Tensor, weight1: Tensor, weight2: Tensor, **_: Any) -> int:
    """`npu_ffn`: both products."""
    rows = x.numel() // x.shape[-1]
    return product(x, weight1) + 2 * rows * weight2.shape[-2] * weight2.shape[-1]


_backward = partial(fusion_attention, backward=True)

FORMULAS: dict[str, Callable[..., int | Pending]] = {
    "npu::npu_fusion_attention": fusion_attention,
    "npu::npu_fusion_attention_v2": fusion_attention,
    "npu::npu_fusion_attention_v3": fusion_attention,
    "npu::npu_fusion_attention_grad": _backward,
    "npu::npu_fusion_attention_grad_v2": _backward,
    "npu::npu_fusion_attention_grad_v3": _backward,
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_grouped_matmul_add": grouped_add,
    "npu::npu_grouped_matmul_add_": grouped_add,
    "npu::npu_mm_all_reduce_base": matmul_reduced,
    "npu::npu_quant_matmul": matmul_reduced,
    "npu::npu_all_gather_base_mm": gathered_matmul,
    "npu::npu_all_gather_quant_mm": gathered_matmul,
    "npu::npu_mm_reduce_scatter_base": matmul_scattered,
    "npu::npu_quant_mm_reduce_scatter": matmul_scattered,
    "npu::npu_alltoallv_gmm": exchanged_grouped,
    "npu::npu_gmm_alltoallv": grouped_exchanged,
    "npu::npu_ffn": feed_forward,
    "npu::npu_linear": lambda input, weight, **_: linear(input, weight),
    "npu::npu_linear_backward": linear_backward,
    "npu::npu_bmmV2": lambda input, mat2, **_: product(input, mat2),
    "npu::npu_fused_matmul": matmul_reduced,
    "npu::npu_conv2d": convolution,
    "npu::npu_conv2d_backward": convolution_backward,
    "npu::npu_convolution": convolution,
    "npu::npu_convolution_backward": convolution_backward,
    "atb::_npu_matmul_add_fp32": matmul_add,
}
