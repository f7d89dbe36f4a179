"""Tests of the attention family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ms_ops

from ...attention.layout import attend, from_bhsd, to_bhsd
from ...device import upcast
from ..case import ErrorSample, OpTest, Sample, maker


def attention_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `attention`, all with `return_lse`."""
    make = maker(dtype, device)

    def call(name: str, tensors: tuple[Tensor, ...], **kwargs: Any) -> Sample:
        return Sample(name, tensors, {"return_lse": True, **kwargs}, (0, 1, 2))

    def qkv(
        sq: int = 9,
        sk: int = 9,
        heads: int = 4,
        groups: int = 4,
        d: int = 8,
        dv: int = 8,
        b: int = 2,
    ) -> tuple[Tensor, ...]:
        return make(b, sq, heads, d), make(b, sk, groups, d), make(b, sk, groups, dv)

    def turned(order: tuple[int, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(t.permute(order).contiguous() for t in tensors)

    for causal in (False, True):
        tag = "causal" if causal else "dense"
        yield call(f"bshd_{tag}", qkv(), causal=causal)
        yield call(f"sbhd_{tag}", turned((1, 0, 2, 3), qkv(13, 13)), layout="sbhd", causal=causal)
        yield call(f"bhsd_{tag}", turned((0, 2, 1, 3), qkv()), layout="bhsd", causal=causal)
        yield call(f"gqa_{tag}", qkv(17, 17, 6, 2), causal=causal)
        yield call(f"mqa_{tag}", qkv(5, 5, 4, 1, d=3, dv=3), causal=causal)
        yield call(f"narrow_v_{tag}", qkv(11, 11, 4, 2, d=12, dv=5), causal=causal)
        yield call(f"wide_v_{tag}", qkv(7, 7, 2, 2, d=4, dv=9), causal=causal)
        yield call(f"long_{tag}", qkv(130, 130, 2, 1, d=16, dv=16, b=1), causal=causal, scale=0.3)
    for align in ("lower_right", "upper_left"):
        for sq, sk in ((5, 12), (12, 5), (1, 7)):
            tensors = qkv(sq, sk, 4, 2)
            yield call(f"{align}_{sq}x{sk}", tensors, causal=True, causal_align=align)
    mask = make(2, 1, 9, 9, dtype=torch.float64) > -0.5
    mask[0, 0, 3] = False
    yield call("mask", qkv(), mask=mask)
    yield call("mask_causal_gqa", qkv(groups=2), mask=mask, causal=True)
    yield call("mask_2d", qkv(), mask=mask[1, 0])
    yield call("mask_keys", qkv(), mask=mask[:, :, :1])
    packed = make(2, 9, 3, 4, 8)
    yield call("packed", tuple(packed.unbind(2)), causal=True)
    yield call(
        "channel_strided", tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in qkv())
    )
    yield call("no_queries", qkv(0, 5))
    yield call("no_keys", qkv(3, 0))
    yield call("no_batch", qkv(b=0), causal=True)
    yield call("no_values", qkv(dv=0))


def attention_errors() -> Iterator[ErrorSample]:
    """Yield calls of `attention` that must raise."""
    make = maker(torch.float32, "cpu")
    q, k = make(2, 5, 4, 8), make(2, 7, 2, 8)
    yield ErrorSample("list", (q, [1.0], k), TypeError, "k: got list")
    yield ErrorSample("ints", (q.long(), k, k), TypeError, "q: got torch.int64")
    yield ErrorSample("dtype", (q, k.half(), k), TypeError, "k: got torch.float16")
    yield ErrorSample("dims", (q, k[0], k), ValueError, "k: got 3 dimensions, need 4")
    yield ErrorSample("layout", (q, k, k), ValueError, "layout: got 'thd'", {"layout": "thd"})
    yield ErrorSample(
        "align", (q, k, k), ValueError, "causal_align: got 'left'", {"causal_align": "left"}
    )
    yield ErrorSample("channels", (q, make(2, 7, 2, 6), k), ValueError, "k: got 6 channels, need 8")
    yield ErrorSample(
        "no_channels", (q[..., :0], k[..., :0], k), ValueError, "at least one channel"
    )
    yield ErrorSample("batch", (q, k[:1], k[:1]), ValueError, "k: got batch 1, need 2")
    yield ErrorSample("value", (q, k, k[:, :6]), ValueError, "need (2, 2, 7), those of k")
    yield ErrorSample("groups", (q, make(2, 7, 3, 8), make(2, 7, 3, 8)), ValueError, "a divisor of")
    yield ErrorSample("mask_dtype", (q, k, k), TypeError, "mask: got", {"mask": make(5, 7)})
    yield ErrorSample(
        "mask_shape", (q, k, k), ValueError, "broadcasts to", {"mask": make(5, 6).bool()}
    )
    yield ErrorSample("device", (q, k.to("meta"), k), RuntimeError, "need all tensors on one")


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    causal_align: str = "lower_right",
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with the score matrix in the dtype of q."""
    allowed = attend(mask, causal_align if causal else "", q, k, layout)
    query, key, value = (to_bhsd(t, layout) for t in (q, k, v))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    probs = torch.softmax(scores, -1)
    if allowed is not None:
        probs = probs.masked_fill(~allowed, 0.0)
    out = from_bhsd(probs @ value, layout)
    return out, torch.logsumexp(upcast(scores), -1)


TESTS = (
    OpTest(
        name="attention",
        function=ms_ops.attention,
        samples=attention_samples,
        errors=attention_errors,
        plain=plain_attention,
        outputs=("M", "S"),
        gradients={0: "MG", 1: "MG", 2: "MG"},
        traced=("gqa_causal", "mask_causal_gqa"),
        resized=("bshd_causal", "gqa_causal"),
        grows={0: 1, 1: 1, 2: 1},
    ),
)
