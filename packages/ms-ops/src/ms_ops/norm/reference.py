"""RMSNorm in plain torch: the oracle, exact to rounding in fp64."""

from __future__ import annotations

from torch import Tensor

from ..device import compute_dtype
from ..registry import Backend, Kernel


def forward(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd): y = x * rstd * (weight + offset), rstd = (mean(x^2) + eps)^(-1/2)."""
    dims = tuple(range(-weight.dim(), 0))
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    rstd = (wide.pow(2).mean(dims, keepdim=True) + eps).pow(-0.5)
    normed = wide * rstd
    if casting == "llama":
        normed = normed.to(x.dtype).to(dtype)
    y = normed * (weight.to(dtype) + weight_offset)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight); dweight is summed in the compute dtype, then cast."""
    dims = tuple(range(-weight.dim(), 0))
    dtype = compute_dtype(x.dtype)
    normed = x.to(dtype) * rstd
    wide = dy.to(dtype)
    grad = wide * (weight.to(dtype) + weight_offset)
    dx = rstd * (grad - normed * (grad * normed).mean(dims, keepdim=True))
    if casting == "llama":
        normed = normed.to(x.dtype).to(dtype)
    rows = tuple(range(x.dim() - weight.dim()))
    dweight = (wide * normed).sum(rows) if rows else wide * normed
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype).contiguous()


BACKEND = Backend("reference", 100, {"rms_norm": Kernel(forward, backward)})

__all__ = ["BACKEND", "backward", "forward"]
