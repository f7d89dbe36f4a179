"""RMSNorm for any device: few passes over memory, the row reduction as a matrix-vector product.

The temporaries are one compute-dtype tensor in forward and one in backward (two more for the
upcast of low-precision inputs); none of them outlives the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import upcast
from ..registry import Backend, Kernel


def forward(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd) with y rounded once ("fp32") or after the norm as well ("llama")."""
    size = weight.numel()
    rows = upcast(x).reshape(-1, size)
    rstd = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rstd = rstd.square().div_(size).add_(eps).rsqrt_()
    normed = rows * rstd
    if casting == "llama" and normed.dtype != x.dtype:
        normed = upcast(normed.to(x.dtype))
    y = normed.mul_(_scale(weight, weight_offset, normed))
    return y.to(x.dtype).view(x.shape), rstd.view(_rstd_shape(x, weight))


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) from x and rstd, which are all that forward saves."""
    size = weight.numel()
    rows, grad, rstd = (
        t.reshape(-1, k) for t, k in ((upcast(x), size), (upcast(dy), size), (rstd, 1))
    )
    scale = _scale(weight, weight_offset, rows)
    product = grad * rows
    row_dot = torch.mv(product, scale)
    if casting == "llama" and rows.dtype != x.dtype:
        dweight = (grad * (rows * rstd).to(x.dtype)).sum(0)
    else:
        dweight = product.mul_(rstd).sum(0)
    correction = rstd.pow(3).mul_(row_dot.unsqueeze(-1)).mul_(-1.0 / size)
    dx = torch.mul(grad, scale).mul_(rstd).addcmul_(rows, correction)
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype).view(weight.shape)


def _scale(weight: Tensor, offset: float, like: Tensor) -> Tensor:
    flat = weight.reshape(-1).to(like.dtype)
    return flat + offset if offset else flat


def _rstd_shape(x: Tensor, weight: Tensor) -> list[int]:
    return [*x.shape[: x.dim() - weight.dim()], *[1] * weight.dim()]


BACKEND = Backend("portable", 90, {"rms_norm": Kernel(forward, backward)})
