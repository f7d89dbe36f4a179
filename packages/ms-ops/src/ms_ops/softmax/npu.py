"""Softmax under a mask by torch_npu's kernel, on the shapes that it documents.

Four dimensions, of which the last two have 32 to 4096 places and are divided by 32; anything else
runs in torch's own operators. What the kernel puts in masked places (and in rows that are all
masked) is left open by its documents: they are set to 0 afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..registry import Backend, Kernel
from . import portable
from .reference import left_out

SMALLEST, LARGEST, STEP = 32, 4096, 32


def forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return y."""
    if not _serves(x):
        return portable.forward(x, mask, scale, causal)
    out = left_out(x, mask, causal)
    y: Tensor = npu.op("npu_scaled_masked_softmax")(x.contiguous(), _mask(x, out), scale, False)
    return y if out is None else y.masked_fill(out, 0.0)


def backward(dy: Tensor, y: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Return dx; y is 0 where masked, and so is dx."""
    if not _serves(y):
        return portable.backward(dy, y, mask, scale, causal)
    out = left_out(y, mask, causal)
    dx: Tensor = npu.op("npu_scaled_masked_softmax_backward")(
        dy.contiguous(), y, _mask(y, out), scale, False
    )
    return dx if out is None else dx.masked_fill(out, 0.0)


def _serves(x: Tensor) -> bool:
    if x.dim() != 4 or x.numel() == 0:
        return False
    return all(SMALLEST <= n <= LARGEST and n % STEP == 0 for n in x.shape[2:])


def _mask(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.zeros((1, 1, *x.shape[2:]), dtype=torch.bool, device=x.device)
    return out.reshape((1,) * (4 - out.dim()) + tuple(out.shape)).contiguous()


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"scaled_masked_softmax": Kernel(forward, backward, npu.declines)},
    npu.available,
)
