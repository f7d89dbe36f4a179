"""The sum that is normalised, and which of its elements dropout keeps; shared by the backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.philox import philox
from ..device import compute_dtype

_WORD = 0xFFFFFFFF


def keep_mask(x: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """Return bool like x, True where an element stays, a function of its row and column alone.

    The number of an element is word `column mod 4` of Philox4x32-10 for the counter (row low,
    column / 4, row high, offset) under the key `seed`; it is dropped below p.
    """
    if rng is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    size = x.shape[-1]
    row = torch.arange(x.shape[:-1].numel(), device=x.device).unsqueeze(1)
    column = torch.arange((size + 3) // 4, device=x.device)
    seed, offset = rng[0], rng[1]
    counter = (row & _WORD, column, row >> 32, offset & _WORD)
    drawn = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    values = torch.stack(drawn, -1).flatten(-2)[:, :size]
    return (values >= round(p * 2**32)).view(x.shape)


def scaled(x: Tensor, row_scale: Tensor | None, layer_scale: Tensor | None) -> Tensor:
    """Return x * row_scale * layer_scale in the compute dtype; x itself when nothing changes it."""
    z = x.to(compute_dtype(x.dtype))
    if row_scale is not None:
        z = z * row_scale.to(z.dtype).unsqueeze(-1)
    if layer_scale is not None:
        z = z * layer_scale.to(z.dtype)
    return z


def dropped(z: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Return z with what the mask drops set to 0 and the rest divided by 1 - p."""
    if p == 0 or mask is None:
        return z
    return torch.where(mask, z / (1 - p) if p < 1 else z, 0.0)


def pre_dtype(x: Tensor, residual: Tensor | None, in_fp32: bool) -> torch.dtype:
    """Return the dtype of the sum that the next layer gets."""
    if residual is not None:
        return residual.dtype
    return compute_dtype(x.dtype) if in_fp32 else x.dtype
