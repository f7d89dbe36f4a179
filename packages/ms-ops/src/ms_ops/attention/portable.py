"""Attention on torch's own kernels.

On CPU this is torch's flash kernel, which never holds the score matrix: it takes grouped heads and
any strides, returns the log-sum-exp and has a backward op. What it lacks is arranged around it:
channels of keys and values that differ are padded with zeros, which is exact; a triangle of a
rectangle that is not aligned to the upper left and boolean masks become an additive mask.
Low-precision inputs are upcast for the call: the kernel's own bf16 mode sums the gradients of a
head group in bf16, so that its error grows with the group, and was not faster where measured.
Other devices run the written-out form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import upcast
from ..registry import Backend, Facts, Kernel
from . import reference
from .layout import attend, from_bhsd, sizes, to_bhsd

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as the reference does."""
    if not _serves(q, k, v):
        return reference.forward(q, k, v, mask, causal, scale, layout)
    query, key, value = _operands(q, k, v, layout)
    is_causal, allowed = _masking(mask, causal, q, k, layout)
    bias = _additive(allowed, query.dtype)
    out, lse = _flash(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    if allowed is not None:
        # The kernel gives rows without any key the log-sum-exp 0.
        lse = lse.masked_fill(~_rows(allowed, lse), -math.inf)
    out = from_bhsd(out[..., : v.shape[-1]].to(q.dtype), layout).contiguous()
    return out, lse.contiguous()


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) from the saved output and log-sum-exp."""
    if not _serves(q, k, v):
        return reference.backward(dout, q, k, v, out, lse, mask, causal, scale, layout)
    query, key, value = _operands(q, k, v, layout)
    y, dy = (_operand(t, layout, query.shape[-1]) for t in (out, dout))
    is_causal, allowed = _masking(mask, causal, q, k, layout)
    if allowed is not None:
        # exp(-inf - 0) is the 0 that a row without any key needs; -inf would give NaN.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
    bias = _additive(allowed, query.dtype)
    grads = _flash_backward(
        dy, query, key, value, y, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    dq, dk, dv = (
        from_bhsd(g[..., : t.shape[-1]].to(t.dtype), layout).contiguous()
        for g, t in zip(grads, (q, k, v), strict=True)
    )
    return dq, dk, dv


def _serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Torch's CPU kernel divides by the sizes: an empty tensor ends the process."""
    return q.device.type == "cpu" and 0 not in (q.numel(), k.numel(), v.numel())


def _operands(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[Tensor, ...]:
    width = max(q.shape[-1], v.shape[-1])
    return tuple(_operand(t, layout, width) for t in (q, k, v))


def _operand(x: Tensor, layout: str, width: int) -> Tensor:
    x = upcast(to_bhsd(x, layout))
    missing = width - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _masking(
    mask: Tensor | None, causal: str, q: Tensor, k: Tensor, layout: str
) -> tuple[bool, Tensor | None]:
    """Return (use the kernel's own upper-left triangle, mask that remains to be applied)."""
    square = sizes(q, layout)[2] == sizes(k, layout)[2]
    if mask is None and causal and (square or causal == "upper_left"):
        return True, None
    allowed = attend(mask, causal, q, k, layout)
    if allowed is not None:
        allowed = allowed.reshape((1,) * (4 - allowed.dim()) + tuple(allowed.shape))
    return False, allowed


def _additive(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if allowed is None:
        return None
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, -math.inf)


def _rows(allowed: Tensor, lse: Tensor) -> Tensor:
    return allowed.any(-1).expand(lse.shape)


def _supports(facts: Facts) -> str | None:
    if facts.device == "npu":
        return "torch's own kernels for NPU tensors belong to the backend 'npu'"
    return None


BACKEND = Backend("portable", 90, {"attention": Kernel(forward, backward, _supports)})
