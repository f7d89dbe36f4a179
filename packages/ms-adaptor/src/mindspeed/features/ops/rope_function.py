"""Megatron's rotary functions on ms_ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import ms_ops

# Megatron hands the same table of angles to every layer of every step: its cosines and sines are
# computed once and live as long as the table.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def apply_bshd(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Rotate queries or keys.

    Args:
        t: [s, b, heads, d].
        freqs: angles [s, 1 or b, 1, r] with r <= d; channels from r on stay.
        rotary_interleaved: pairs are neighbouring channels, not halves.
        multi_latent_attention: the pairs of t are neighbours and become halves first.
        mscale: factor of cos and sin.
    """
    width = freqs.shape[-1]
    if multi_latent_attention:
        turned = torch.cat((t[..., 0:width:2], t[..., 1:width:2]), -1)
        t = torch.cat((turned, t[..., width:]), -1) if width < t.shape[-1] else turned
    cos, sin = _table(freqs, mscale)
    return ms_ops.rope(t, cos, sin, interleaved=rotary_interleaved)


def apply_fused(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys with the arguments of Megatron's slot for a fused function."""
    return apply_bshd(t, freqs, rotary_interleaved=interleaved)


def tables_of(freqs: Tensor) -> tuple[Tensor, ...]:
    """Return what is kept of a table of angles as long as it lives: cosines and sines."""
    known = _tables.get(freqs)
    return () if known is None else known[1]


def _table(freqs: Tensor, mscale: float) -> tuple[Tensor, Tensor]:
    if freqs.requires_grad or torch.compiler.is_compiling():
        return _trig(freqs, mscale)
    key = (freqs._version, mscale)
    known = _tables.get(freqs)
    if known is None or known[0] != key:
        known = _tables[freqs] = (key, _trig(freqs, mscale))
    return known[1]  # type: ignore[no-any-return]


def _trig(freqs: Tensor, mscale: float) -> tuple[Tensor, Tensor]:
    cos, sin = freqs.cos(), freqs.sin()
    return (cos, sin) if mscale == 1.0 else (cos * mscale, sin * mscale)
