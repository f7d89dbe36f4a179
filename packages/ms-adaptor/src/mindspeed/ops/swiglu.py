"""`swiglu`: the gated activation, on any device."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Return silu of the first half of x along `dim`, times the second; see `ms_ops.swiglu`."""
    return ms_ops.swiglu(x, dim)
