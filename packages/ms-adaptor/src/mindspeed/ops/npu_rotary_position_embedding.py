"""`npu_rotary_position_embedding`: rotate channels by angles given as cosine and sine."""

from __future__ import annotations

from torch import Tensor

import ms_ops
from ms_ops.checks import fail

_OP = "npu_rotary_position_embedding"


def npu_rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int = 0) -> Tensor:
    """Return x * cos + rotated(x) * sin, see `ms_ops.rope`.

    Args:
        x: four dimensions in any order, the last one of even size D.
        cos: [.., .., .., D], broadcasts to x; both halves (mode 0) or neighbours (mode 1) filled.
        sin: like cos.
        mode: 0 pairs channel i with i + D/2, 1 pairs neighbouring channels.

    Raises:
        ValueError: x without four dimensions, an odd size, an unknown mode, cos and sin of two
            shapes or narrower than x, or only one of them with a gradient.
    """
    if mode not in (0, 1):
        fail(ValueError, _OP, "mode", mode, "0 or 1")
    if x.dim() != 4:
        fail(ValueError, _OP, "x", f"{x.dim()} dimensions", "4")
    if cos.shape[-1] != x.shape[-1]:
        fail(ValueError, _OP, "cos", tuple(cos.shape), f"{x.shape[-1]} channels, as x has")
    return ms_ops.rope(x, cos, sin, interleaved=mode == 1)
