"""Masks and lengths of a call in the form that torch_npu's fused attention takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..masks import UNBOUNDED, MaskSpec, npu_form
from .call import Call
from .layout import PACKED, sizes
from .pattern import allowed, whole
from .starts import ends_of

# How many sequences the compressed prefix mode takes at most, and how many a pack.
PREFIXES, SEQUENCES = 32, 1000


@dataclass(frozen=True)
class Masking:
    """Keywords of the kernel, its bounds, and which rows see no key (bool, like lse, or None)."""

    keywords: dict[str, Any] = field(default_factory=dict)
    pre: int = UNBOUNDED
    next: int = UNBOUNDED
    empty: Tensor | None = None


def traced(x: Tensor) -> bool:
    """Whether a tensor only stands for one while a graph is made."""
    return isinstance(x, FunctionalTensor)


def spare_tokens(call: Call, q: Tensor, k: Tensor) -> tuple[int, int] | None:
    """Return how many query and key tokens at the end of a pack belong to no sequence, or None."""
    if call.cu_q is None or call.cu_k is None or traced(q):
        return None
    spare = (q.shape[0] - ends_of(call.cu_q)[-1], k.shape[0] - ends_of(call.cu_k)[-1])
    return spare if any(spare) else None


def masking(call: Call, q: Tensor, k: Tensor) -> Masking | None:
    """Return how the kernel masks a call, None when it cannot."""
    if call.layout == PACKED:
        return None if traced(q) else _packed(call, q, k)
    batch, heads, rows, _ = sizes(q, call.layout)
    keys = sizes(k, call.layout)[2]
    if call.mask is None and not call.banded:
        return Masking()
    spec = _spec(call, [(rows, keys)] * batch)
    if call.mask is None and spec is not None:
        form = npu_form(spec, q.device)
        words: dict[str, Any] = {"sparse_mode": form.sparse_mode, "atten_mask": form.atten_mask}
        if form.prefix:
            words["prefix"] = list(form.prefix)
        empty = None if form.prefix else _empty(call, rows, keys, q.device)
        words["inner_precise"] = 2 if empty is not None else 0
        return Masking(words, form.pre_tokens, form.next_tokens, empty)
    seen = allowed(call, whole(batch, heads, rows, keys, q.device))
    assert seen is not None
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    full = seen.expand(*_kernel_shape(seen, batch, heads), rows, keys)
    words = {"sparse_mode": 1, "atten_mask": (~full).contiguous(), "inner_precise": 2}
    return Masking(words, empty=~seen.any(-1))


def _kernel_shape(seen: Tensor, batch: int, heads: int) -> tuple[int, int]:
    """Return batch and heads of a mask of BNSS, B1SS or 11SS."""
    if seen.shape[1] != 1:
        return batch, heads
    return (1 if seen.shape[0] == 1 else batch), 1


def _packed(call: Call, q: Tensor, k: Tensor) -> Masking | None:
    assert call.cu_q is not None
    assert call.cu_k is not None
    ends = [ends_of(t) for t in (call.cu_q, call.cu_k)]
    lengths = [[b - a for a, b in itertools.pairwise([0, *e])] for e in ends]
    pairs = list(zip(*lengths, strict=True))
    if len(pairs) > SEQUENCES or any(rows and not keys for rows, keys in pairs):
        return None
    words: dict[str, Any] = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1]}
    if not call.banded:
        return Masking(words)
    spec = _spec(call, pairs)
    if spec is None or (not call.prefix and any(_sees_nothing(call, *pair) for pair in pairs)):
        return None
    form = npu_form(spec, q.device)
    words |= {"sparse_mode": form.sparse_mode, "atten_mask": form.atten_mask}
    if form.prefix:
        words["prefix"] = list(form.prefix)
    return Masking(words, form.pre_tokens, form.next_tokens)


def _spec(call: Call, shapes: list[tuple[int, int]]) -> MaskSpec | None:
    """Return the structured mask when the kernel has a mode for it, else None."""
    if not call.window or len(call.window) > 2:
        return None
    left, right = call.window
    square = all(rows == keys for rows, keys in shapes)
    corner = "lower_right" if square else call.corner
    if call.prefix:
        plain = corner == "lower_right" and call.causal and len(shapes) <= PREFIXES
        numbers = call.prefix * (len(shapes) if len(call.prefix) == 1 else 1)
        pairs = zip(numbers, shapes, strict=True)
        # What the triangle shows to every query need not be in the prefix, nor more than all keys.
        clamped = (min(max(p, keys - rows, 0), keys) for p, (rows, keys) in pairs)
        return MaskSpec(right=0, align="lower_right", prefix=tuple(clamped)) if plain else None
    if (not call.causal and corner != "lower_right") or left < 0 or right < 0:
        return None
    low, high = (None if bound >= UNBOUNDED else bound for bound in (left, right))
    return MaskSpec(low, high, "lower_right" if corner == "lower_right" else "upper_left")


def _empty(call: Call, rows: int, keys: int, device: torch.device) -> Tensor | None:
    """Return bool [rows], True where a query sees no key; None when every query sees one."""
    if not _sees_nothing(call, rows, keys):
        return None
    corner = keys - rows if call.corner == "lower_right" else 0
    place = torch.arange(rows, device=device) + corner
    left, right = call.window
    return (place + right < 0) | (place - left > keys - 1)


def _sees_nothing(call: Call, rows: int, keys: int) -> bool:
    """Whether the window leaves some query of a sequence without a key."""
    corner = keys - rows if call.corner == "lower_right" else 0
    left, right = call.window
    return rows > 0 and (corner + right < 0 or rows - 1 + corner - left > keys - 1)
