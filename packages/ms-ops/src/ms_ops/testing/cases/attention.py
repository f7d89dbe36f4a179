"""Tests of the attention family."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ms_ops

from ...attention.arguments import prepare
from ...attention.call import Call
from ...attention.layout import from_bhsd, lse_from_bhs, lse_shape, to_bhsd
from ...attention.pattern import added, allowed, kept, whole
from ...device import LOW_PRECISION, compute_dtype, upcast
from ..case import ErrorSample, OpTest, Sample, maker


def attention_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `attention`, all with `return_lse`; every third in fp16.

    fp16 takes the same code as bf16 and differs in the bounds only.
    """
    step = 3 if dtype is torch.float16 else 1
    return itertools.islice(_attention_calls(dtype, device), 0, None, step)


def _attention_calls(dtype: torch.dtype, device: str) -> Iterator[Sample]:
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
        yield call(f"gqa_{tag}", qkv(17, 17, 6, 2), causal=causal)
    yield call("sbhd_causal", turned((1, 0, 2, 3), qkv(13, 13)), layout="sbhd", causal=True)
    yield call("bhsd_dense", turned((0, 2, 1, 3), qkv()), layout="bhsd")
    yield call("mqa_causal", qkv(5, 5, 4, 1, d=3, dv=3), causal=True)
    yield call("narrow_v_causal", qkv(11, 11, 4, 2, d=12, dv=5), causal=True)
    yield call("wide_v_dense", qkv(7, 7, 2, 2, d=4, dv=9))
    yield call("long_causal", qkv(130, 130, 2, 1, d=16, dv=16, b=1), causal=True, scale=0.3)
    for align, sq, sk in (
        ("lower_right", 5, 12),
        ("lower_right", 12, 5),
        ("lower_right", 1, 7),
        ("upper_left", 6, 12),
        ("upper_left", 12, 5),
    ):
        tensors = qkv(sq, sk, 4, 2)
        yield call(f"{align}_{sq}x{sk}", tensors, causal=True, causal_align=align)
    mask = make(2, 1, 9, 9, dtype=torch.float64) > -0.5
    mask[0, 0, 3] = False
    yield call("mask", qkv(), mask=mask)
    yield call("mask_causal_gqa", qkv(groups=2), mask=mask, causal=True)
    yield call("mask_keys", qkv(), mask=mask[:, :, :1])
    packed = make(2, 9, 3, 4, 8)
    yield call("packed", tuple(packed.unbind(2)), causal=True)
    yield call(
        "channel_strided", tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in qkv())
    )
    yield from _structured(make, qkv, call)
    yield from _biased(make, qkv, call)
    yield from _packed(make, call)
    yield call("no_queries", qkv(0, 5))
    yield call("no_keys", qkv(3, 0))
    yield call("no_batch", qkv(b=0), causal=True)
    yield call("no_values", qkv(dv=0))


def _structured(make: Any, qkv: Any, call: Any) -> Iterator[Sample]:
    """Yield windows, prefixes and odd sequences."""
    yield call("window", qkv(19, 19, groups=2), window=(4, 1))
    yield call("window_rectangle", qkv(5, 12), window=(3, None))
    yield call("causal_window", qkv(150, 150, 1, 1, d=4, dv=4, b=1), causal=True, window=(9, None))
    shifted = {"causal": True, "causal_align": "upper_left", "q_start": 4, "kv_start": 1}
    yield call("starts", qkv(6, 7), **shifted)
    prefix = ms_ops.MaskSpec(right=0, align="lower_right", prefix=(3, 0))
    yield call("prefix", qkv(7, 9), mask=prefix)
    yield call("edge", qkv(6, 6), mask=ms_ops.from_sparse_mode(7, 2, -1))
    nowhere = ms_ops.MaskSpec(left=-20, right=30)
    yield call("band_outside", qkv(5, 6), mask=nowhere)


def _biased(make: Any, qkv: Any, call: Any) -> Iterator[Sample]:
    """Yield bias, ALiBi, sink and dropout."""
    tensors = qkv(7, 9, groups=2)
    for name, shape in (("bias", (2, 4, 7, 9)), ("bias_heads", (4, 1, 9))):
        yield _also(call(name, tensors, bias=make(*shape), bias_scaled=name == "bias"), "bias")
    yield call("bias_constant", qkv(130, 40, 2, 2, b=1), bias=make(130, 40), causal=True)
    slopes = ms_ops.alibi_slopes(4, device=tensors[0].device)
    yield call("alibi", tensors, alibi_slopes=slopes, causal=True, q_start=3)
    yield call("alibi_sqrt", tensors, alibi_slopes=slopes.expand(2, 4), alibi_sqrt=True)
    yield _also(call("sink", qkv(17, 17, groups=2), sink=make(4), causal=True), "sink")
    mask = make(2, 1, 7, 9, dtype=torch.float64) > 0
    mask[0, 0, 3] = False
    many = {"sink": make(4), "bias": make(2, 1, 7, 9), "mask": mask, "alibi_slopes": slopes}
    rng = torch.tensor([2**40 + 5, 7], device=tensors[0].device)
    sample = call("everything", tensors, dropout_p=0.4, dropout_rng=rng, **many)
    yield _also(sample, "bias")
    yield call("dropout", qkv(9, 9), dropout_p=0.3, dropout_rng=rng, causal=True)


def _packed(make: Any, call: Any) -> Iterator[Sample]:
    """Yield packed sequences: one is empty, and the last tokens belong to none."""
    tensors = make(15, 4, 8), make(17, 2, 8), make(17, 2, 5)
    own = torch.tensor([0, 4, 4, 13], dtype=torch.int32, device=tensors[0].device)
    keys = torch.tensor([0, 2, 5, 17], dtype=torch.int64, device=own.device)
    same = (tensors[0][:13], tensors[1][:13], tensors[2][:13])
    yield call("thd", same, layout="thd", cu_seqlens_q=own, causal=True)
    both = {"layout": "thd", "cu_seqlens_q": own, "cu_seqlens_k": keys}
    yield call("thd_cross", tensors, **both)
    yield call("thd_lower_right", tensors, **both, causal=True, window=(5, None))
    spec = ms_ops.MaskSpec(right=0, align="lower_right", prefix=(1, 2, 6))
    slopes = ms_ops.alibi_slopes(4, device=own.device)
    rng = torch.tensor([3, 1], device=own.device)
    options = {"mask": spec, "alibi_slopes": slopes, "dropout_p": 0.2, "dropout_rng": rng}
    yield _also(call("thd_everything", tensors, **both, **options, sink=make(4)), "sink")


def _also(sample: Sample, *names: str) -> Sample:
    """Return a sample that differentiates some keywords too."""
    return Sample(sample.name, sample.args, sample.kwargs, (*sample.differentiable, *names))


def attention_errors() -> Iterator[ErrorSample]:
    """Yield calls of `attention` that must raise."""
    make = maker(torch.float32, "cpu")
    q, k = make(2, 5, 4, 8), make(2, 7, 2, 8)
    yield ErrorSample("list", (q, [1.0], k), TypeError, "k: got list")
    yield ErrorSample("ints", (q.long(), k, k), TypeError, "q: got torch.int64")
    yield ErrorSample("dtype", (q, k.half(), k), TypeError, "k: got torch.float16")
    yield ErrorSample("dims", (q, k[0], k), ValueError, "k: got 3 dimensions, need 4")
    yield ErrorSample("layout", (q, k, k), ValueError, "layout: got 'hsd'", {"layout": "hsd"})
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
    yield from _option_errors(q, k)
    yield from _packed_errors(make)
    yield ErrorSample("device", (q, k.to("meta"), k), RuntimeError, "need all tensors on one")


def _option_errors(q: Tensor, k: Tensor) -> Iterator[ErrorSample]:
    def bad(name: str, kind: type[Exception], message: str, **options: Any) -> ErrorSample:
        return ErrorSample(name, (q, k, k), kind, message, options)

    spec = ms_ops.MaskSpec(right=0)
    yield bad("two_masks", ValueError, "mask: got a MaskSpec beside", mask=spec, causal=True)
    prefixes = ms_ops.MaskSpec(right=0, prefix=(1, 2, 3))
    yield bad("prefixes", ValueError, "mask: got 3 prefixes, need one, or 2", mask=prefixes)
    yield bad("bias_shape", ValueError, "bias: got (6, 7)", bias=q.new_zeros(6, 7))
    yield bad("bias_dtype", TypeError, "bias: got torch.int64", bias=q.new_zeros(7).long())
    yield bad("sink_shape", ValueError, "sink: got (2,), need (4,)", sink=q.new_zeros(2))
    slopes = q.new_zeros(4)
    yield bad("slopes", ValueError, "alibi_slopes: got (2,)", alibi_slopes=slopes[:2])
    learnt = slopes.clone().requires_grad_()
    yield bad("learnt_slopes", ValueError, "need a constant", alibi_slopes=learnt)
    yield bad("dropout", ValueError, "dropout_p: got 1.5", dropout_p=1.5)
    yield bad("rng", ValueError, "need torch.int64 (2,)", dropout_p=0.5, dropout_rng=slopes)
    yield bad("heads", ValueError, "head_start: got", dropout_p=0.5, head_start=4093)
    starts = torch.tensor([0, 5])
    yield bad("starts", ValueError, "need layout 'thd'", cu_seqlens_q=starts)


def _packed_errors(make: Any) -> Iterator[ErrorSample]:
    tensors = (make(6, 4, 8), make(6, 2, 8), make(6, 2, 8))

    def bad(name: str, kind: type[Exception], message: str, **options: Any) -> ErrorSample:
        return ErrorSample(name, tensors, kind, message, {"layout": "thd", **options})

    good = torch.tensor([0, 2, 6])
    yield bad("no_starts", TypeError, "cu_seqlens_q: got NoneType")
    yield bad("float_starts", TypeError, "need torch.int32", cu_seqlens_q=good.float())
    yield bad("short", ValueError, "[N + 1] with N", cu_seqlens_q=good[:1])
    yield bad("not_from_0", ValueError, "rise from 0", cu_seqlens_q=good[1:])
    yield bad("too_long", ValueError, "at most 6", cu_seqlens_q=good + torch.tensor([0, 0, 1]))
    keys = {"cu_seqlens_q": good, "cu_seqlens_k": torch.tensor([0, 6])}
    yield bad("counts", ValueError, "cu_seqlens_k: got 1 sequences, need 2", **keys)
    yield bad("dense", ValueError, "None with layout 'thd'", cu_seqlens_q=good, mask=good > 0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with the score matrix in the dtype of q."""
    call = Call(*prepare(q, k, v, **options)[3:])
    query, key, value = (to_bhsd(t, call.layout) for t in (q, k, v))
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * call.scale
    batch, heads, rows, keys = scores.shape
    block = whole(batch, heads, rows, keys, scores.device)
    bias, seen, keep = added(call, block, q.dtype), allowed(call, block), kept(call, block)
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    if call.sink is not None:
        sink = call.sink.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    probs = torch.softmax(scores, -1)[..., : key.shape[2]]
    probs = probs if seen is None else probs.masked_fill(~seen, 0.0)
    if keep is not None:
        probs = probs * keep / (1 - call.dropout_p)
    lse = torch.logsumexp(upcast(scores), -1)
    return from_bhsd(probs @ value, call.layout), lse_from_bhs(lse, call.layout)


def merge_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    """Yield calls of `attention_merge`."""
    make = maker(dtype, device)
    wide = compute_dtype(dtype)

    def call(name: str, shape: tuple[int, ...], layout: str, first: torch.dtype = dtype) -> Sample:
        out1, out2 = make(*shape, dtype=first), make(*shape)
        sums = [make(*lse_shape(out1, layout), dtype=wide) * 3 for _ in range(2)]
        tensors = (out1, sums[0], out2, sums[1])
        return Sample(name, tensors, {"layout": layout}, (0, 1, 2, 3))

    for layout in ("bshd", "sbhd", "bhsd"):
        yield call(layout, (2, 3, 6, 5), layout)
    yield call("thd", (7, 2, 3), "thd")
    yield call("no_tokens", (0, 2, 3), "thd")
    if dtype in LOW_PRECISION:
        yield call("accumulator", (2, 3, 4, 5), "bshd", wide)
    # Too large for finite differences, which cannot move an infinite log-sum-exp.
    sample = call("rows_without_keys", (2, 3, 4, 20), "bshd")
    out1, lse1, out2, lse2 = sample.args
    for place, (out, lse) in enumerate(((out1, lse1), (out2, lse2))):
        lse[:, :, : 2 - place] = -math.inf
        out[:, : 2 - place] = 0
    yield sample


def merge_errors() -> Iterator[ErrorSample]:
    """Yield calls of `attention_merge` that must raise."""
    make = maker(torch.float32, "cpu")
    out, lse = make(2, 3, 4, 5), make(2, 4, 3)
    yield ErrorSample("list", ([1.0], lse, out, lse), TypeError, "out1: got list")
    yield ErrorSample("ints", (out.long(), lse, out, lse), TypeError, "out1: got torch.int64")
    yield ErrorSample("dims", (out[0], lse, out, lse), ValueError, "out1: got 3 dimensions, need 4")
    yield ErrorSample("shape", (out, lse, out[1:], lse), ValueError, "out2: got (1, 3, 4, 5)")
    yield ErrorSample("lse", (out, lse, out, lse[:, 1:]), ValueError, "lse2: got (2, 3, 3)")
    yield ErrorSample("low_lse", (out, lse.half(), out, lse), TypeError, "lse1: got torch.float16")
    yield ErrorSample(
        "lower_first", (out.half(), lse, out, lse), TypeError, "out2: got torch.float32"
    )
    yield ErrorSample("layout", (out, lse, out, lse), ValueError, "layout:", {"layout": "bsh"})
    yield ErrorSample(
        "device", (out, lse, out.to("meta"), lse), RuntimeError, "need all tensors on one"
    )


def plain_merge(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, layout: str
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by sums of exponentials, as ring attention is commonly written."""
    top = torch.maximum(lse1, lse2)
    empty = top == -math.inf
    top = top.masked_fill(empty, 0.0)
    parts = [torch.exp(lse - top) for lse in (lse1, lse2)]
    total = parts[0] + parts[1]
    order = {"bshd": (0, 2, 1), "sbhd": (2, 0, 1)}.get(layout)
    weights = [part / total.clamp(min=1e-30) for part in parts]
    weights = [w if order is None else w.permute(order) for w in weights]
    out = weights[0].unsqueeze(-1) * out1 + weights[1].unsqueeze(-1) * out2
    lse = top + total.masked_fill(empty, 1.0).log()
    return out.to(out1.dtype), lse.masked_fill(empty, -math.inf)


TESTS = (
    OpTest(
        name="attention_merge",
        function=ms_ops.attention_merge,
        samples=merge_samples,
        errors=merge_errors,
        plain=plain_merge,
        outputs=("E1", "S"),
        gradients={0: "E1", 1: "E1", 2: "E1", 3: "E1"},
        traced=("sbhd",),
        resized=("bshd", "rows_without_keys"),
        grows={0: 0, 1: 0, 2: 0, 3: 0},
        differentiable_outputs=(0, 1),
    ),
    OpTest(
        name="attention",
        function=ms_ops.attention,
        samples=attention_samples,
        errors=attention_errors,
        plain=plain_attention,
        outputs=("M", "S"),
        gradients={0: "MG", 1: "MG", 2: "MG", "bias": "MG", "sink": "MG"},
        traced=("mask_causal_gqa",),
        resized=("bshd_causal", "gqa_causal"),
        grows={0: 1, 1: 1, 2: 1},
    ),
)
