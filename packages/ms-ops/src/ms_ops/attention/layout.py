"""Layouts and masks that every attention backend shares."""

from __future__ import annotations

import torch
from torch import Tensor

# Where batch, heads, sequence and channels stand.
LAYOUTS = {"bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3), "bhsd": (0, 1, 2, 3)}
# "": not causal. Otherwise which corner of the score matrix the diagonal ends in or starts from.
CAUSAL = ("", "lower_right", "upper_left")


def to_bhsd(x: Tensor, layout: str) -> Tensor:
    """View `x` of a layout as [B, H, S, D]."""
    return x.permute(LAYOUTS[layout])


def from_bhsd(x: Tensor, layout: str) -> Tensor:
    """View `x` [B, H, S, D] in a layout."""
    order = LAYOUTS[layout]
    return x.permute([order.index(i) for i in range(4)])


def sizes(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Return (batch, heads, sequence, channels) of `x`."""
    b, h, s, d = (x.shape[i] for i in LAYOUTS[layout])
    return b, h, s, d


def causal_mask(rows: int, columns: int, align: str, device: torch.device) -> Tensor:
    """Return bool [rows, columns], True where a query may attend.

    "lower_right" aligns the last query with the last key, "upper_left" the first with the first.
    """
    offset = columns - rows if align == "lower_right" else 0
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(offset)


def attend(mask: Tensor | None, causal: str, q: Tensor, k: Tensor, layout: str) -> Tensor | None:
    """Combine mask and causality into one bool tensor that broadcasts to [B, H, Sq, Sk]."""
    if not causal:
        return mask
    rows, columns = sizes(q, layout)[2], sizes(k, layout)[2]
    triangle = causal_mask(rows, columns, causal, q.device)
    return triangle if mask is None else mask & triangle
