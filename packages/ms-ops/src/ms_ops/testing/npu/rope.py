"""torch_npu's rotary embedding as documented: which shapes it takes, what it casts."""

from __future__ import annotations

import torch
from torch import Tensor

from .require import need, need_dtypes


def rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Return x * cos + R(x) * sin; cos and sin are cast to x's dtype first."""
    _check("npu_rotary_mul", x, r1, r2, rotary_mode)
    need("npu_rotary_mul", rotate is None, "no rotate matrix")
    cos, sin = (t.to(x.dtype).float() for t in (r1, r2))
    wide = x.float()
    return (wide * cos + _turn(wide, rotary_mode) * sin).to(x.dtype)


def rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dcos, dsin); the last two are undefined here, as nothing of ours reads them."""
    _check("npu_rotary_mul_backward", grad, r1, r2, rotary_mode)
    need("npu_rotary_mul_backward", x.shape == grad.shape and x.dtype == grad.dtype, "x like grad")
    cos, sin = (t.to(grad.dtype).float() for t in (r1, r2))
    wide = grad.float()
    dx = wide * cos - _turn(wide * sin, rotary_mode)
    unread = [torch.full_like(t, torch.nan, dtype=grad.dtype) for t in (r1, r2)]
    return dx.to(grad.dtype), unread[0], unread[1]


def _turn(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((-second, first), -1).flatten(-2)


def _check(op: str, x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> None:
    need_dtypes(op, x)
    need(op, mode in ("half", "interleave"), "mode half or interleave")
    need(op, x.dim() == 4 and cos.dim() == 4, "four dimensions")
    need(op, cos.shape == sin.shape and cos.dtype == sin.dtype, "cos like sin")
    width = x.shape[-1]
    need(op, width % 2 == 0 and width < 896 and cos.shape[-1] == width, "even D < 896, cos alike")
    # Which dimensions of cos are not 1; one of size 1 in x fits either way.
    varies = [c != 1 for c in cos.shape[:3]]
    fits = all(c in (1, n) for c, n in zip(cos.shape[:3], x.shape[:3], strict=True))
    need(op, fits, f"cos {tuple(cos.shape)} that broadcasts to x {tuple(x.shape)}")
    if mode == "interleave":
        need(op, sum(varies) <= 1, "11SD, 1S1D or S11D")


KERNELS = {
    "npu::npu_rotary_mul": rotary_mul,
    "npu::npu_rotary_mul_backward": rotary_mul_backward,
}
