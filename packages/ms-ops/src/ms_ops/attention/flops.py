"""FLOPs of attention: 2 P (D + Dv) for each head forward, P score entries that count.

A causal diagonal counts half, so that a square has S^2 / 2 entries. Backward has four products for
the two of forward, and one more that a kernel launches: the scores again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..masks import UNBOUNDED
from .call import Call
from .layout import sizes


def forward_flops(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, attention: str = "model", **_: Any
) -> int:
    """FLOPs of one call.

    Args:
        q: as the operator takes it, like all that follow.
        k: likewise.
        v: likewise.
        *rest: likewise. The values of a mask tensor are not read: entries that it leaves out
            count. Those of sequence lengths are, which waits for the device they are on.
        attention: "model" counts what the structured mask leaves, "launched" what the backend
            computes, "full" all entries (packed sequences are always apart).
    """
    call, backend = Call(*rest[:-1]), rest[-1]
    _batch, heads, _rows, channels = sizes(q, call.layout)
    return _double_entries(call, q, k, backend, attention) * heads * (channels + v.shape[-1])


def backward_flops(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
    attention: str = "model",
    **_: Any,
) -> int:
    """FLOPs of one backward call."""
    call, backend = Call(*rest[:-2]), rest[-1]
    _batch, heads, _rows, channels = sizes(q, call.layout)
    factors = (3, 2) if attention == "launched" else (2, 2)
    entries = _double_entries(call, q, k, backend, attention)
    return entries * heads * (factors[0] * channels + factors[1] * v.shape[-1])


def _double_entries(call: Call, q: Tensor, k: Tensor, backend: str, kind: str) -> int:
    """Twice the score entries of all sequences of the batch or the pack."""
    batch, _, rows, _ = sizes(q, call.layout)
    pairs = [(rows, sizes(k, call.layout)[2])] * batch
    # A tracer's lengths have no values: what counts then is the pack as one sequence.
    if type(call.cu_q) is Tensor and type(call.cu_k) is Tensor:
        pairs = list(zip(_lengths(call.cu_q), _lengths(call.cu_k), strict=True))
    return sum(
        _of_sequence(call, i, len(pairs), *pair, backend, kind) for i, pair in enumerate(pairs)
    )


def _lengths(cu: Tensor) -> list[int]:
    values: list[int] = cu.diff().tolist()
    return values


def _of_sequence(
    call: Call, index: int, count: int, rows: int, keys: int, backend: str, kind: str
) -> int:
    if not call.banded or kind == "full":
        return 2 * rows * keys
    if kind == "launched" and not _skips(call, rows, keys, backend):
        return 2 * rows * keys
    left, right = call.bounds(index, count)
    corner = keys - rows if call.corner == "lower_right" else 0
    prefix = 0
    if call.prefix:
        prefix = min(keys, call.prefix[index if len(call.prefix) > 1 else 0])
    upper = keys if right == UNBOUNDED else corner + right + 1
    seen = rows * keys if right == UNBOUNDED else _clamped(rows, upper, prefix, keys)
    if left != UNBOUNDED:
        seen -= _clamped(rows, corner - left, prefix, keys) - rows * prefix
    diagonal = max(0, min(rows, keys - corner) - max(0, prefix - corner)) if right == 0 else 0
    return max(0, 2 * seen - diagonal)


def _clamped(rows: int, start: int, low: int, high: int) -> int:
    """Sum of start + i over i below `rows`, each held between `low` and `high`."""
    first = min(rows, max(0, low - start))
    last = min(rows, max(first, high - start))
    middle = last - first
    between = middle * start + (first + last - 1) * middle // 2
    return first * low + between + (rows - last) * high


def _skips(call: Call, rows: int, keys: int, backend: str) -> bool:
    """Whether a backend leaves out the upper triangle and does not only mask it."""
    if backend == "reference" or call.mask is not None:
        return False
    square = rows == keys or call.corner == "upper_left"
    return backend != "portable" or (call.causal and square)
