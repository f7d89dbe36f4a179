"""FLOPs of attention: which score entries count, and the formulas of torch's kernels.

With H heads, D channels of queries and keys, Dv of values, and P score entries that count:

    forward               2 H P (D + Dv)                    q k^T and p v
    backward, "model"     4 H P (D + Dv)                    dv = p^T do, dp = do v^T, ds k, ds^T q
    backward, "launched"  2 H P (3 D + 2 Dv)                the same, and q k^T once more

P of one sequence is Sq Sk without a mask. An entry above a causal diagonal or left of a window does
not count, and one on a causal diagonal counts half, so that a causal square has S^2 / 2, the number
that Megatron-LM and the published utilisations use. Packed sequences add up: sum of S_i^2 / 2.
"full" ignores every mask (packing too is kept apart: sequences of a pack never meet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

Attention = Literal["model", "launched", "full"]
ATTENTION: tuple[Attention, ...] = ("model", "launched", "full")


@dataclass(frozen=True)
class Mask:
    """A band of the score matrix, as kernels take it by flags.

    Query i sees key j where `i + offset - left <= j <= i + offset + right`, and the first `prefix`
    keys always; None means no bound. The offset is 0 for `upper_left` and Sk - Sq for
    `lower_right`.
    """

    left: int | None = None
    right: int | None = None
    align: Literal["upper_left", "lower_right"] = "upper_left"
    prefix: int = 0


DENSE = Mask()
CAUSAL = Mask(right=0)
CAUSAL_LOWER_RIGHT = Mask(right=0, align="lower_right")


class Shape(NamedTuple):
    """Sizes of one attention without its lengths: heads (times batch), channels of q and of v."""

    heads: int
    qk_dim: int
    v_dim: int


class Lengths(NamedTuple):
    """Query and key length of one sequence."""

    q: int
    k: int


class Pending(Protocol):
    """A count that needs numbers which are on a device; a meter resolves it when it is read."""

    def resolve(self) -> int:
        """Return the count; waits for the device."""


@dataclass(frozen=True)
class PendingLengths:
    """A count that needs the lengths of packed sequences.

    They are kept as a copy on the device, so that nothing waits for it in the step.
    """

    count: Callable[[list[Lengths]], int]
    starts_q: Tensor
    starts_k: Tensor

    def resolve(self) -> int:
        """Return the count; waits for the device."""
        return self.count(lengths_of(self.starts_q.tolist(), self.starts_k.tolist()))


def lengths_of(starts_q: Sequence[int], starts_k: Sequence[int]) -> list[Lengths]:
    """Lengths of packed sequences from their starts, each list with the total as last entry."""
    pairs = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    return [Lengths(q1 - q0, k1 - k0) for q0, q1, k0, k1 in pairs]


def double_entries(q: int, k: int, mask: Mask = DENSE) -> int:
    """Twice the number of score entries of q queries and k keys that count under a mask."""
    offset = k - q if mask.align == "lower_right" else 0
    prefix = min(mask.prefix, k)
    last = k if mask.right is None else offset + mask.right + 1
    seen = _clamped(q, last, prefix, k) if mask.right is not None else q * k
    if mask.left is not None:
        seen -= _clamped(q, offset - mask.left, 0, k)
    twice = 2 * seen
    if mask.right == 0:
        twice -= max(0, min(q, k - offset) - max(0, prefix - offset))
    return twice


def _clamped(rows: int, start: int, low: int, high: int) -> int:
    """Sum of `start + i` for i below `rows`, each term held between `low` and `high`."""
    span = high - low

    def upto(x: int) -> int:
        if x <= 0:
            return 0
        return x * (x - 1) // 2 if x <= span else span * (span - 1) // 2 + span * (x - span)

    start -= low
    return rows * low + upto(start + rows) - upto(start)


def forward_flops(
    shape: Shape, lengths: Iterable[Lengths], mask: Mask, attention: Attention
) -> int:
    """FLOPs of one forward over sequences that share a shape and a mask."""
    return _entries(lengths, mask, attention) * shape.heads * (shape.qk_dim + shape.v_dim)


def backward_flops(
    shape: Shape, lengths: Iterable[Lengths], mask: Mask, attention: Attention
) -> int:
    """FLOPs of one backward; "launched" includes the scores that a flash kernel computes again."""
    entries = _entries(lengths, mask, attention) * shape.heads
    if attention == "launched":
        return entries * (3 * shape.qk_dim + 2 * shape.v_dim)
    return entries * 2 * (shape.qk_dim + shape.v_dim)


def _entries(lengths: Iterable[Lengths], mask: Mask, attention: Attention) -> int:
    return sum(double_entries(q, k, DENSE if attention == "full" else mask) for q, k in lengths)


_Count = Callable[[Shape, Iterable[Lengths], Mask, Attention], int]


def _bhsd(count: _Count, q: Tensor, k: Tensor, v: Tensor, mask: Mask, attention: Attention) -> int:
    """Count dense attention of [B, H, S, D] tensors."""
    batch, heads, rows, channels = q.shape
    shape = Shape(batch * heads, channels, v.shape[-1])
    return count(shape, [Lengths(rows, k.shape[-2])], mask, attention)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    *,
    attention: Attention,
    **_: Any,
) -> int:
    """Forward of a kernel behind `scaled_dot_product_attention`."""
    return _bhsd(forward_flops, query, key, value, CAUSAL if is_causal else DENSE, attention)


def sdpa_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    *,
    attention: Attention,
    **_: Any,
) -> int:
    """Its backward."""
    return _bhsd(backward_flops, query, key, value, CAUSAL if is_causal else DENSE, attention)


def _window(causal: bool, left: int | None, right: int | None) -> Mask:
    """The band of the flash kernels: -1 or None means no bound, causal is `right` 0."""
    bounds = [None if b is None or b < 0 else int(b) for b in (left, right)]
    return Mask(bounds[0], 0 if causal else bounds[1], "lower_right")


def _varlen(
    count: _Count,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    mask: Mask,
    attention: Attention,
) -> int | Pending:
    """Count [B, S, H, D], or packed [T, H, D] with the starts of the sequences."""
    heads, channels = q.shape[-2:]
    if starts_q is None or starts_k is None:
        shape = Shape(q.shape[0] * heads, channels, v.shape[-1])
        return count(shape, [Lengths(q.shape[1], k.shape[1])], mask, attention)
    shape = Shape(heads, channels, v.shape[-1])
    return packed(lambda found: count(shape, found, mask, attention), starts_q, starts_k)


def packed(
    count: Callable[[list[Lengths]], int], starts_q: Tensor, starts_k: Tensor
) -> int | Pending:
    """Count now when the starts are in host memory, else when the counts are read."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(starts_q, FakeTensor) or starts_q.is_meta:
        raise NotImplementedError(
            "the lengths of packed sequences are values, which fake and meta tensors do not have"
        )
    if starts_q.device.type == "cpu":
        return count(lengths_of(starts_q.tolist(), starts_k.tolist()))
    return PendingLengths(count, starts_q.clone(), starts_k.clone())


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    *,
    attention: Attention,
    **_: Any,
) -> int | Pending:
    """`aten::_flash_attention_forward`."""
    mask = _window(is_causal, window_size_left, window_size_right)
    return _varlen(forward_flops, query, key, value, cum_seq_q, cum_seq_k, mask, attention)


def flash_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    is_causal: bool,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    *,
    attention: Attention,
    **_: Any,
) -> int | Pending:
    """`aten::_flash_attention_backward`."""
    mask = _window(is_causal, window_size_left, window_size_right)
    return _varlen(backward_flops, query, key, value, cum_seq_q, cum_seq_k, mask, attention)


def _efficient_mask(kind: int, window: int | None) -> Mask:
    align: Literal["upper_left", "lower_right"] = "lower_right" if kind == 2 else "upper_left"
    # The kernel's window counts the query's own key.
    left = window - 1 if window else None
    return Mask(left, 0 if kind else None, align)


def efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    custom_mask_type: int,
    window_size: int | None = None,
    *,
    attention: Attention,
    **_: Any,
) -> int | Pending:
    """`aten::_efficient_attention_forward`; a pack has a leading dimension of 1."""
    mask = _efficient_mask(custom_mask_type, window_size)
    return _varlen(forward_flops, query, key, value, cu_seqlens_q, cu_seqlens_k, mask, attention)


def efficient_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    custom_mask_type: int,
    window_size: int | None = None,
    *,
    attention: Attention,
    **_: Any,
) -> int | Pending:
    """`aten::_efficient_attention_backward`."""
    mask = _efficient_mask(custom_mask_type, window_size)
    return _varlen(backward_flops, query, key, value, cu_seqlens_q, cu_seqlens_k, mask, attention)


_KERNELS = (
    "flash_attention_for_cpu",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)

# Operator name to formula; formulas take the operator's arguments by the names of its schema.
FORMULAS: dict[str, Callable[..., int | Pending]] = {
    **{f"aten::_scaled_dot_product_{kernel}": sdpa for kernel in _KERNELS},
    **{f"aten::_scaled_dot_product_{kernel}_backward": sdpa_backward for kernel in _KERNELS},
    "aten::_flash_attention_forward": flash_forward,
    "aten::_flash_attention_forward_no_dropout_inplace": flash_forward,
    "aten::_flash_attention_backward": flash_backward,
    "aten::_efficient_attention_forward": efficient_forward,
    "aten::_efficient_attention_backward": efficient_backward,
}
