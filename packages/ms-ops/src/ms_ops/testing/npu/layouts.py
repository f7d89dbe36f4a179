"""Where torch_npu's attention keeps batch, heads and sequence, and how it stores statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .require import need

Ends = tuple[list[int], list[int]] | None
# Turns [B, N, S, D] into a layout of four dimensions and back: each order is its own inverse but
# for SBND.
TO_BNSD = {"BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}
FROM_BNSD = {**TO_BNSD, "SBH": (2, 0, 1, 3)}
COPIES = 8


def split(x: Tensor, layout: str, heads: int, ends: Ends, side: int) -> list[Tensor]:
    """Cut a tensor into problems [B, N, S, D] in fp32: one, or one a packed sequence."""
    x = x.float()
    if layout != "TND":
        x = x.unflatten(-1, (heads, -1)) if layout in ("BSH", "SBH") else x
        return [x.permute(TO_BNSD[layout])]
    need("npu_fusion_attention", ends is not None, "both lists of lengths for TND")
    assert ends is not None
    own = ends[side]
    need("npu_fusion_attention", own[-1] == x.shape[0], "lengths that cover all tokens")
    need("npu_fusion_attention", len(ends[0]) == len(ends[1]) <= 1000, "as many keys as queries")
    return [x[a:b].transpose(0, 1).unsqueeze(0) for a, b in zip([0, *own[:-1]], own, strict=True)]


def join(parts: list[Tensor], layout: str) -> Tensor:
    """Invert `split`."""
    if layout == "TND":
        return torch.cat([p.squeeze(0).transpose(0, 1) for p in parts])
    x = parts[0].permute(FROM_BNSD[layout])
    return (x.flatten(2) if layout in ("BSH", "SBH") else x).contiguous()


def statistics(parts: list[Tensor], layout: str, stats_layout: str) -> Tensor:
    """Store [B, N, S, 1]: [B, N, S, 8]; for a pack [T, N, 8], by default filled [N, S, 8] by
    [N, S, 8], sequence after sequence.
    """
    wide = [p.expand(*p.shape[:-1], COPIES) for p in parts]
    if layout != "TND":
        return wide[0].contiguous()
    heads, tokens = parts[0].shape[1], sum(p.shape[2] for p in parts)
    turned = [w.transpose(1, 2) if stats_layout == "TND" else w for w in wide]
    return torch.cat([t.reshape(-1) for t in turned]).view(tokens, heads, COPIES)


def from_statistics(x: Tensor, layout: str, stats_layout: str, ends: Ends) -> list[Tensor]:
    """Invert `statistics`."""
    fits = x.dtype is torch.float32 and x.shape[-1] == COPIES and x.is_contiguous()
    need("npu_fusion_attention_grad", fits, "fp32 statistics with eight copies")
    need("npu_fusion_attention_grad", bool((x == x[..., :1]).all()), "eight equal copies")
    if layout != "TND":
        return [x[..., :1]]
    assert ends is not None
    heads, parts, start = x.shape[1], [], 0
    for end in ends[0]:
        block = x.reshape(-1)[start * heads * COPIES : end * heads * COPIES]
        shape = (1, end - start, heads, COPIES) if stats_layout == "TND" else (1, heads, -1, COPIES)
        part = block.reshape(shape) if end > start else x.new_empty(1, heads, 0, COPIES)
        turned = stats_layout == "TND" and end > start
        parts.append((part.transpose(1, 2) if turned else part)[..., :1])
        start = end
    return parts
