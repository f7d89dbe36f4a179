"""The arguments of Ascend's fused attention in those of `ms_ops.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ms_ops.checks import check_choice, check_tensor, fail
from ms_ops.masks import COMPRESSED, from_sparse_mode

OP = "npu_fusion_attention"
LAYOUTS = {"BSH": "bshd", "SBH": "sbhd", "BSND": "bshd", "BNSD": "bhsd", "TND": "thd"}
STATS = 8  # The kernel returns eight copies of each statistic.


def heads_apart(x: Tensor, heads: int, layout: str) -> Tensor:
    """View a tensor of a layout without a dimension of heads with one."""
    return x.unflatten(-1, (heads, -1)) if layout in ("BSH", "SBH") else x


def check(query: Any, heads: int, layout: str, keep_prob: float, padding_mask: Any) -> None:
    """Raise for arguments that no reading of the kernel allows."""
    check_tensor(OP, "query", query)
    check_choice(OP, "input_layout", layout, tuple(LAYOUTS))
    if heads <= 0:
        fail(ValueError, OP, "head_num", heads, "1 or more")
    if layout in ("BSH", "SBH") and (query.dim() != 3 or query.shape[-1] % heads):
        got = f"{tuple(query.shape)} with {heads} heads"
        fail(ValueError, OP, "query", got, "three dimensions, the last a multiple of the heads")
    if not 0.0 < keep_prob <= 1.0:
        fail(ValueError, OP, "keep_prob", keep_prob, "a probability above 0, to 1")
    if padding_mask is not None:
        fail(ValueError, OP, "padding_mask", "a tensor", "None: the kernel does not read it")


def tensors(
    query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with a dimension of heads each; key and value may have fewer."""
    q = heads_apart(query, heads, layout)
    if layout not in ("BSH", "SBH"):
        return q, key, value
    if key.shape[-1] % q.shape[-1]:
        need = f"a multiple of {q.shape[-1]}, the channels of a head"
        fail(ValueError, OP, "key", f"{key.shape[-1]} channels", need)
    groups = key.shape[-1] // q.shape[-1]
    return q, heads_apart(key, groups, layout), heads_apart(value, groups, layout)


def options(
    q: Tensor,
    k: Tensor,
    layout: str,
    *,
    pse: Tensor | None,
    pse_type: int,
    atten_mask: Tensor | None,
    scale: float,
    pre_tokens: int,
    next_tokens: int,
    prefix: Sequence[int] | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    sparse_mode: int,
    q_start_idx: Sequence[int] | None,
    kv_start_idx: Sequence[int] | None,
) -> dict[str, Any]:
    """Return the keywords of `ms_ops.attention`."""
    found: dict[str, Any] = {"layout": LAYOUTS[layout], "scale": scale}
    found |= _lengths(layout, actual_seq_qlen, actual_seq_kvlen, q.device)
    found |= _position(pse, pse_type, q_start_idx, kv_start_idx)
    packed = layout == "TND"
    check_choice(OP, "sparse_mode", sparse_mode, (0, 1, 2, 3, 4, 6, 7, 8) if packed else range(7))
    if atten_mask is None:
        if sparse_mode:
            fail(ValueError, OP, "atten_mask", f"None with sparse_mode {sparse_mode}", _need_mask())
        return found
    _check_mask(atten_mask, sparse_mode)
    spec = from_sparse_mode(
        1 if sparse_mode == 5 else sparse_mode,
        pre_tokens,
        next_tokens,
        prefix if sparse_mode == 6 else None,
    )
    if sparse_mode not in (0, 1, 5):
        return found | {"mask": spec}
    axis = {"bshd": 1, "sbhd": 0, "bhsd": 2}.get(LAYOUTS[layout], 0)
    mask = ~atten_mask.bool()
    if spec.kind != "full":
        mask = mask & spec.dense(q.shape[axis], k.shape[axis], q.device)
    return found | {"mask": mask}


def _need_mask() -> str:
    return "a mask: the kernel computes dense attention without one, whatever the mode"


def _check_mask(mask: Tensor, mode: int) -> None:
    if mask.dtype not in (torch.bool, torch.uint8):
        fail(TypeError, OP, "atten_mask", mask.dtype, "torch.bool or torch.uint8, 1 = left out")
    rows = COMPRESSED * 3 // 2 if mode == 6 else COMPRESSED
    if mode not in (0, 1, 5) and tuple(mask.shape) != (rows, COMPRESSED):
        need = f"({rows}, {COMPRESSED}), the compressed mask of sparse_mode {mode}"
        fail(ValueError, OP, "atten_mask", tuple(mask.shape), need)


def _lengths(
    layout: str, ends_q: Sequence[int] | None, ends_k: Sequence[int] | None, device: torch.device
) -> dict[str, Tensor]:
    """Turn the kernel's lists of ends into starts; trailing zeros stand for unused entries."""
    if layout != "TND":
        return {}
    if ends_q is None or ends_k is None:
        need = "lists of the ends of the sequences with layout 'TND'"
        fail(ValueError, OP, "actual_seq_qlen, actual_seq_kvlen", (ends_q, ends_k), need)
    if len(ends_q) != len(ends_k):
        got = f"{len(ends_q)} and {len(ends_k)} ends"
        fail(ValueError, OP, "actual_seq_qlen, actual_seq_kvlen", got, "lists of one length")
    found = {}
    for name, ends in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k)):
        values = [int(end) for end in ends]
        for i in range(1, len(values)):
            values[i] = values[i] or values[i - 1]
        found[name] = torch.tensor([0, *values], dtype=torch.int32, device=device)
    return found


def _position(
    pse: Tensor | None,
    pse_type: int,
    q_start: Sequence[int] | None,
    kv_start: Sequence[int] | None,
) -> dict[str, Any]:
    check_choice(OP, "pse_type", pse_type, range(4))
    if pse is None:
        if pse_type > 1:
            fail(ValueError, OP, "pse", f"None with pse_type {pse_type}", "the slopes")
        return {}
    if pse_type < 2:
        return {"bias": pse, "bias_scaled": pse_type == 1}
    starts = [0 if start is None else int(start[0]) for start in (q_start, kv_start)]
    named = {"q_start": starts[0], "kv_start": starts[1]}
    return {"alibi_slopes": pse, "alibi_sqrt": pse_type == 3, **named}
