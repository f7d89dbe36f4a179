"""Rotary embedding by torch_npu's kernel, on one of the shapes that it documents.

The kernel takes four dimensions and casts cos and sin to x's dtype. Low-precision x with fp32 cos
and sin is therefore rotated in fp32 and rounded once; cos and sin in x's dtype save those casts.
Its backward reads dy, cos and sin: x only gives a shape there, so dy stands in for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import npu
from ..registry import Backend, Kernel
from . import portable

# The kernel takes fewer channels than this.
WIDTH = 896
# Along which dimensions cos varies ("v") or is constant ("c"), neighbours of a kind merged, and
# where these dimensions go among the first three of x. cos becomes S11D, 11SD or 1S1D.
FORMS = {"v": (0,), "vc": (0, 2), "cv": (0, 2), "c": (2,), "cvc": (0, 1, 2)}


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x * cos + R(x) * sin over the first cos.shape[-1] channels."""
    if not _serves(x, cos):
        return portable.forward(x, cos, sin, interleaved)
    wide, cos4, sin4 = _arrange(x, cos, sin)
    mode = "interleave" if interleaved else "half"
    y = npu.op("npu_rotary_mul")(wide, cos4, sin4, rotary_mode=mode)
    return _restore(y, x, cos)


def backward(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return dx = dy * cos + R^T(dy * sin)."""
    if not _serves(dy, cos):
        return portable.backward(dy, cos, sin, interleaved)
    wide, cos4, sin4 = _arrange(dy, cos, sin)
    mode = "interleave" if interleaved else "half"
    dx = npu.op("npu_rotary_mul_backward")(wide, wide, cos4, sin4, rotary_mode=mode)[0]
    return _restore(dx, dy, cos)


def _serves(x: Tensor, cos: Tensor) -> bool:
    return x.numel() != 0 and 0 < cos.shape[-1] < WIDTH


def _arrange(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotated channels, cos and sin in one of `FORMS`."""
    width = cos.shape[-1]
    kinds, sizes = _merged(x, cos)
    if kinds not in FORMS:
        # One row of cos and sin for every row of x.
        cos, sin = (t.expand(*x.shape[:-1], width) for t in (cos, sin))
        kinds, sizes = "v", [x.shape[:-1].numel()]
    shape, trig = [1, 1, 1, width], [1, 1, 1, width]
    for kind, size, place in zip(kinds, sizes, FORMS[kinds], strict=True):
        shape[place] = size
        trig[place] = size if kind == "v" else 1
    dtype = torch.promote_types(x.dtype, cos.dtype)
    return (
        x[..., :width].to(dtype).reshape(shape).contiguous(),
        cos.to(dtype).reshape(trig).contiguous(),
        sin.to(dtype).reshape(trig).contiguous(),
    )


def _merged(x: Tensor, cos: Tensor) -> tuple[str, list[int]]:
    """Return the kinds of x's leading dimensions and their sizes; those of size 1 are left out."""
    kinds, sizes = "", list[int]()
    for angles, size in zip(cos.shape[:-1], x.shape[:-1], strict=True):
        if size == 1:
            continue
        kind = "c" if angles == 1 else "v"
        if kinds.endswith(kind) and kinds:
            sizes[-1] *= size
        else:
            kinds += kind
            sizes.append(size)
    return (kinds, sizes) if kinds else ("c", [1])


def _restore(y: Tensor, x: Tensor, cos: Tensor) -> Tensor:
    """Give the rotated channels x's shape and dtype, and put x's other channels behind them."""
    width = cos.shape[-1]
    turned = y.to(x.dtype).reshape(*x.shape[:-1], width)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


BACKEND = Backend(
    "npu",
    npu.PRIORITY,
    {"rope": Kernel(forward, backward, npu.declines)},
    npu.available,
)
