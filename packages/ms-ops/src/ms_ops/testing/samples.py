"""Inputs that every backend of an operator must serve, and inputs that it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Sample:
    """One call: its arguments, and which of them are differentiated (by position)."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class ErrorSample:
    """One call that must raise `kind` with a message that contains `message`."""

    name: str
    args: tuple[Any, ...]
    kind: type[Exception]
    message: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def maker(dtype: torch.dtype, device: str) -> Make:
    """Return a function that makes normal tensors of a shape, the same ones every time."""
    generator = torch.Generator().manual_seed(20)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        wide = torch.randn(shape, generator=generator, dtype=torch.float64)
        return wide.to(dtype).to(device)

    return make


def rms_norm(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Yield calls of `rms_norm_with_rstd`."""
    make = maker(dtype, device)
    both = (0, 1)
    for shape in ((4, 16), (3, 5, 63), (2, 3, 2, 100), (7, 1), (33,), (0, 8), (129, 257)):
        yield Sample(f"shape{shape}", (make(*shape), make(shape[-1])), {}, both)
    yield Sample("weight_2d", (make(3, 4, 5), make(4, 5)), {"eps": 1e-5}, both)
    yield Sample("offset", (make(5, 31), make(31)), {"weight_offset": 1.0}, both)
    yield Sample("llama", (make(5, 31), make(31)), {"casting": "llama"}, both)
    yield Sample("transposed", (make(12, 7, 5).transpose(0, 2), make(12)), {}, both)
    yield Sample("sliced", (make(6, 40)[:, 3:24:2], make(22)[::2]), {}, both)
    yield Sample("expanded", (make(1, 9).expand(4, 9), make(9)), {}, both)
    if dtype in (torch.float16, torch.bfloat16):
        yield Sample("fp32_weight", (make(6, 24), make(24, dtype=torch.float32)), {}, both)


def swiglu(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Yield calls of `swiglu`."""
    make = maker(dtype, device)
    # The last shape is larger than what a backend may take as one block of rows.
    for shape in ((4, 16), (3, 5, 62), (2,), (0, 6), (5, 0), (65, 514), (3, 211, 1026)):
        yield Sample(f"shape{shape}", (make(*shape),))
    yield Sample("dim0", (make(6, 7),), {"dim": 0})
    yield Sample("dim1", (make(3, 10, 7),), {"dim": 1})
    yield Sample("transposed", (make(14, 5).t(),))
    yield Sample("sliced", (make(5, 40)[:, 4:32:2],))
    yield Sample("large", (make(4, 16) * 30,))


def rope(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    """Yield calls of `rope`."""
    make = maker(dtype, device)

    def trig(*shape: int, of: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        angles = make(*shape, dtype=torch.float64) * 3
        of = torch.float64 if dtype is torch.float64 else of
        return angles.cos().to(of), angles.sin().to(of)

    for interleaved in (False, True):
        kwargs = {"interleaved": interleaved}
        tag = "pairs" if interleaved else "halves"
        yield Sample(f"sbnd_{tag}", (make(7, 2, 3, 8), *trig(7, 1, 1, 8)), kwargs)
        yield Sample(f"bnsd_{tag}", (make(2, 3, 5, 6), *trig(1, 1, 5, 6)), kwargs)
        yield Sample(f"partial_{tag}", (make(5, 2, 3, 10), *trig(5, 1, 1, 4)), kwargs)
        packed = make(5, 2, 3, 24)[..., 8:16]
        yield Sample(f"sliced_{tag}", (packed, *trig(5, 2, 1, 8)), kwargs)
        yield Sample(f"trig_grad_{tag}", (make(4, 2, 3, 6), *trig(4, 1, 1, 6)), kwargs, (0, 1, 2))
    yield Sample("tnd", (make(11, 3, 8), *trig(11, 1, 8)))
    # Larger than what a backend may take as one block.
    yield Sample("blocks_sbnd", (make(130, 1, 40, 64), *trig(130, 1, 1, 64)))
    yield Sample("blocks_bnsd", (make(3, 20, 70, 64), *trig(1, 1, 70, 64)))
    yield Sample("empty", (make(0, 2, 3, 8), *trig(0, 1, 1, 8)))
    yield Sample("no_channels", (make(4, 1, 2, 6), *trig(4, 1, 1, 0)))
    yield Sample("transposed", (make(2, 3, 9, 8).transpose(1, 2), *trig(1, 9, 1, 8)))
    if dtype in (torch.float16, torch.bfloat16):
        yield Sample("low_trig", (make(7, 2, 3, 8), *trig(7, 1, 1, 8, of=dtype)))


def attention(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
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
