"""torch_npu's norms as documented: fp32 inside, one rounding, rstd and dgamma in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from .require import need, need_contiguous, need_dtypes


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return (y, rstd); gamma has x's dtype, or fp32 with low-precision x."""
    _check(x, gamma)
    dims = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    rstd = (wide.square().mean(dims, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx, dgamma); dgamma is fp32 whatever gamma is."""
    _check(x, gamma)
    need("npu_rms_norm_backward", dy.shape == x.shape and dy.dtype == x.dtype, "dy like x")
    rows = [*x.shape[: x.dim() - gamma.dim()], *[1] * gamma.dim()]
    statistics = rstd.dtype is torch.float32 and list(rstd.shape) == rows
    need("npu_rms_norm_backward", statistics, f"rstd fp32 {rows}")
    dims = tuple(range(-gamma.dim(), 0))
    normed, wide = x.float() * rstd, dy.float()
    grad = wide * gamma.float()
    dx = rstd * (grad - normed * (grad * normed).mean(dims, keepdim=True))
    dgamma = (wide * normed).reshape(-1, *gamma.shape).sum(0)
    return dx.to(x.dtype), dgamma


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, rstd, x1 + x2); a sum of 16-bit operands is rounded before it is normalised."""
    _check_sum("npu_add_rms_norm", x1, x2, gamma)
    x = x1 + x2
    y, rstd = rms_norm(x, gamma, epsilon)
    return y, rstd, x


def add_layer_norm(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float = 1e-5,
    additional_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, mean, rstd, x1 + x2); the last is left unwritten unless it is asked for."""
    _check_sum("npu_add_layer_norm", x1, x2, gamma, beta)
    x = x1 + x2
    dims = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    mean = wide.mean(dims, keepdim=True)
    rstd = ((wide - mean).square().mean(dims, keepdim=True) + epsilon).rsqrt()
    y = ((wide - mean) * rstd * gamma.float() + beta.float()).to(x.dtype)
    return y, mean, rstd, x if additional_output else torch.full_like(x, torch.nan)


def _check_sum(op: str, x1: Tensor, x2: Tensor, *weights: Tensor) -> None:
    need_dtypes(op, x1, x2, *weights)
    need_contiguous(op, x1, x2, *weights)
    need(op, x1.shape == x2.shape and x1.numel() > 0, "two tensors alike, not empty")
    last = x1.shape[x1.dim() - weights[0].dim() :]
    need(op, all(w.shape == last for w in weights), "weights like the last dimensions")


def _check(x: Tensor, gamma: Tensor) -> None:
    need_dtypes("npu_rms_norm", x)
    need("npu_rms_norm", gamma.dtype in (x.dtype, torch.float32), f"gamma {x.dtype} or fp32")
    need("npu_rms_norm", x.shape[x.dim() - gamma.dim() :] == gamma.shape, "gamma like x's last")
    need("npu_rms_norm", x.numel() > 0, "a tensor that is not empty")


KERNELS = {
    "npu::npu_add_layer_norm": add_layer_norm,
    "npu::npu_add_rms_norm": add_rms_norm,
    "npu::npu_rms_norm": rms_norm,
    "npu::npu_rms_norm_backward": rms_norm_backward,
}
