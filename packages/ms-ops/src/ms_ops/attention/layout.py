"""Where batch, heads, sequence and channels stand, and what every attention backend shares."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = {"bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3), "bhsd": (0, 1, 2, 3)}
PACKED = "thd"


def to_bhsd(x: Tensor, layout: str) -> Tensor:
    """View `x` of a layout as [B, H, S, D]; a pack is one batch entry."""
    return x.transpose(0, 1).unsqueeze(0) if layout == PACKED else x.permute(LAYOUTS[layout])


def from_bhsd(x: Tensor, layout: str) -> Tensor:
    """View `x` [B, H, S, D] in a layout."""
    if layout == PACKED:
        return x.squeeze(0).transpose(0, 1)
    order = LAYOUTS[layout]
    return x.permute([order.index(i) for i in range(4)])


def lse_from_bhs(lse: Tensor, layout: str) -> Tensor:
    """Return the log-sum-exp [B, H, S] as the operator does: [T, H] for a pack."""
    return lse.squeeze(0).transpose(0, 1) if layout == PACKED else lse


def lse_to_bhs(lse: Tensor, layout: str) -> Tensor:
    """Invert `lse_from_bhs`."""
    return lse.transpose(0, 1).unsqueeze(0) if layout == PACKED else lse


def sizes(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Return (batch, heads, sequence, channels) of `x`."""
    if layout == PACKED:
        return 1, x.shape[1], x.shape[0], x.shape[2]
    b, h, s, d = (x.shape[i] for i in LAYOUTS[layout])
    return b, h, s, d


def lse_shape(q: Tensor, layout: str) -> tuple[int, ...]:
    """Return the shape of the log-sum-exp of a call."""
    batch, heads, rows, _ = sizes(q, layout)
    return (rows, heads) if layout == PACKED else (batch, heads, rows)


def causal_mask(rows: int, columns: int, align: str, device: torch.device) -> Tensor:
    """Return bool [rows, columns], True where a query may attend.

    "lower_right" aligns the last query with the last key, "upper_left" the first with the first.
    """
    offset = columns - rows if align == "lower_right" else 0
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(offset)
