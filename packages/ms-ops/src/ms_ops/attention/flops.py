"""FLOPs of attention: 2 P (D + Dv) for each head forward, P score entries that count.

A causal diagonal counts half, so that a square has S^2 / 2 entries. Backward has four products for
the two of forward, and one more that a kernel launches: the scores again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import sizes


def forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: str,
    scale: float,
    layout: str,
    backend: str,
    *,
    attention: str = "model",
    **_: Any,
) -> int:
    """FLOPs of one call.

    Args:
        q: as the operator takes it, like all that follow.
        k: likewise.
        v: likewise.
        mask: its values are not read: entries that it leaves out count.
        causal: likewise.
        scale: likewise.
        layout: likewise.
        backend: what runs the call.
        attention: "model" counts what the causal mask leaves, "launched" what the backend computes,
            "full" all entries.
    """
    entries = _double_entries(q, k, mask, causal, layout, backend, attention)
    batch, heads, _rows, channels = sizes(q, layout)
    return entries * batch * heads * (channels + v.shape[-1])


def backward_flops(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: str,
    scale: float,
    layout: str,
    backend: str,
    *,
    attention: str = "model",
    **_: Any,
) -> int:
    """FLOPs of one backward call."""
    entries = _double_entries(q, k, mask, causal, layout, backend, attention)
    batch, heads, _rows, channels = sizes(q, layout)
    factors = (3, 2) if attention == "launched" else (2, 2)
    return entries * batch * heads * (factors[0] * channels + factors[1] * v.shape[-1])


def _double_entries(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: str, layout: str, backend: str, kind: str
) -> int:
    rows, columns = sizes(q, layout)[2], sizes(k, layout)[2]
    masked_only = kind == "launched" and not _skips(rows, columns, mask, causal, backend)
    if not causal or kind == "full" or masked_only:
        return 2 * rows * columns
    offset = columns - rows if causal == "lower_right" else 0
    # Query i sees the keys below offset + i and half of the next one.
    first, last = max(0, -offset), min(rows, columns - offset)
    partly = max(0, last - first)
    whole = rows - max(first, last)
    return partly * (2 * (offset + first) + partly) + 2 * columns * whole


def _skips(rows: int, columns: int, mask: Tensor | None, causal: str, backend: str) -> bool:
    """Whether a backend leaves out the upper triangle and does not only mask it."""
    if backend == "reference" or mask is not None:
        return False
    return backend != "portable" or rows == columns or causal == "upper_left"
