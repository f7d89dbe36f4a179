"""Checks of attention's arguments, and their form for the operator."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_float, check_same_dtype, check_tensor, fail
from ..device import autocast_dtype, common_device
from ..masks import ALIGNS, UNBOUNDED, Align, MaskSpec
from .layout import LAYOUTS, PACKED, sizes
from .philox import HEAD_BITS

OP = "attention"
Layout = Literal["bshd", "sbhd", "bhsd", "thd"]
Window = tuple[int | None, int | None]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    causal_align: Align = "lower_right",
    window: Window | None = None,
    mask: Tensor | MaskSpec | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    bias_scaled: bool = False,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    q_start: int = 0,
    kv_start: int = 0,
    head_start: int = 0,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """Check the arguments, apply the autocast policy and return the custom op's arguments."""
    check_choice(OP, "layout", layout, (*LAYOUTS, PACKED))
    _check_tensors(q, k, v, layout)
    cast = autocast_dtype(q.device.type)
    if cast is not None:
        q, k, v = (t.to(cast) for t in (q, k, v))
    check_same_dtype(OP, "k", k, "q", q)
    check_same_dtype(OP, "v", v, "q", q)
    _check_shapes(q, k, v, layout)
    cu_q, cu_k = _lengths(q, k, layout, cu_seqlens_q, cu_seqlens_k)
    if bias is not None:
        _check_scores("bias", bias, q, k, layout)
        check_float(OP, "bias", bias)
    _check_heads(sink, alibi_slopes, q, layout)
    check_choice(OP, "causal_align", causal_align, ALIGNS)
    spec, dense = _masks(mask, causal, causal_align, window, (q_start, kv_start))
    if dense is not None:
        _check_scores("mask", dense, q, k, layout)
        if dense.dtype is not torch.bool:
            fail(TypeError, OP, "mask", dense.dtype, "torch.bool, True where a query attends")
    _check_prefix(spec, q, layout, cu_q)
    rng = _rng(dropout_p, dropout_rng, q, layout, head_start)
    common_device(OP, q, k, v, bias, sink, alibi_slopes, dense, cu_q, cu_k, rng)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    tensors = (q, k, v, bias, sink, alibi_slopes, dense, cu_q, cu_k, rng)
    numbers = (
        _window(spec),
        spec.align if spec.kind != "full" else "upper_left",
        list(spec.prefixes()),
        [q_start, kv_start, head_start],
        kv_start - q_start,
        bool(alibi_sqrt),
        factor if bias_scaled else 1.0,
        float(dropout_p),
        factor,
        layout,
    )
    return (*tensors, *numbers)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    need = 3 if layout == PACKED else 4
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, argument, tensor)
        check_float(OP, argument, tensor)
        if tensor.dim() != need:
            fail(ValueError, OP, argument, f"{tensor.dim()} dimensions", f"{need}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    batch, heads, _, channels = sizes(q, layout)
    k_batch, groups, keys, k_channels = sizes(k, layout)
    if channels == 0:
        fail(ValueError, OP, "q", tuple(q.shape), "at least one channel")
    if k_channels != channels:
        fail(ValueError, OP, "k", f"{k_channels} channels", f"{channels}, those of q")
    if k_batch != batch:
        fail(ValueError, OP, "k", f"batch {k_batch}", f"{batch}, that of q")
    if sizes(v, layout)[:3] != (batch, groups, keys):
        got, need = sizes(v, layout)[:3], (batch, groups, keys)
        fail(ValueError, OP, "v", f"(batch, heads, sequence) {got}", f"{need}, those of k")
    if groups == 0 or heads % groups:
        fail(ValueError, OP, "k", f"{groups} heads", f"a divisor of the {heads} heads of q")


def _lengths(
    q: Tensor, k: Tensor, layout: str, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the starts of packed sequences; those of the keys default to those of the queries."""
    if layout != PACKED:
        for argument, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if cu is not None:
                fail(ValueError, OP, argument, f"a tensor with layout {layout!r}", "layout 'thd'")
        return None, None
    cu_k = cu_q if cu_k is None else cu_k
    for argument, cu, x in (("cu_seqlens_q", cu_q, q), ("cu_seqlens_k", cu_k, k)):
        check_tensor(OP, argument, cu)
        _check_starts(argument, cu, x)
    if cu_q is not None and cu_k is not None and cu_q.shape != cu_k.shape:
        got, need = f"{cu_k.shape[0] - 1} sequences", f"{cu_q.shape[0] - 1}, those of q"
        fail(ValueError, OP, "cu_seqlens_k", got, need)
    return cu_q, cu_k


def _check_starts(argument: str, cu: Any, x: Tensor) -> None:
    if cu.dtype not in (torch.int32, torch.int64):
        fail(TypeError, OP, argument, cu.dtype, "torch.int32 or torch.int64")
    if cu.dim() != 1 or cu.shape[0] < 2:
        fail(ValueError, OP, argument, f"shape {tuple(cu.shape)}", "[N + 1] with N of 1 or more")
    if cu.device.type != "cpu" or type(cu) is not Tensor or torch.compiler.is_compiling():
        return  # Reading the values would wait for a device, or is not possible at all.
    values = cu.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(values))
    if values[0] != 0 or not rising or values[-1] > x.shape[0]:
        need = f"starts that rise from 0 to at most {x.shape[0]}, the tokens"
        fail(ValueError, OP, argument, values, need)


def _check_scores(argument: str, x: Tensor, q: Tensor, k: Tensor, layout: str) -> None:
    """Check a tensor that broadcasts to the score matrices."""
    check_tensor(OP, argument, x)
    if layout == PACKED:
        need = "None with layout 'thd' (a MaskSpec, or alibi_slopes)"
        fail(ValueError, OP, argument, "a tensor", need)
    batch, heads, rows, _ = sizes(q, layout)
    full = (batch, heads, rows, sizes(k, layout)[2])
    tail = full[4 - x.dim() :] if x.dim() <= 4 else ()
    if x.dim() > 4 or any(m not in (1, n) for m, n in zip(x.shape, tail, strict=True)):
        need = f"a shape that broadcasts to (batch, heads, queries, keys) {full}"
        fail(ValueError, OP, argument, tuple(x.shape), need)


def _check_heads(sink: Tensor | None, slopes: Tensor | None, q: Tensor, layout: str) -> None:
    batch, heads = sizes(q, layout)[:2]
    if sink is not None:
        check_tensor(OP, "sink", sink)
        check_float(OP, "sink", sink)
        if tuple(sink.shape) != (heads,):
            fail(ValueError, OP, "sink", tuple(sink.shape), f"{(heads,)}, a number a head")
    if slopes is not None:
        check_tensor(OP, "alibi_slopes", slopes)
        check_float(OP, "alibi_slopes", slopes)
        if tuple(slopes.shape) not in ((heads,), (batch, heads)):
            need = f"{(heads,)} or {(batch, heads)}"
            fail(ValueError, OP, "alibi_slopes", tuple(slopes.shape), need)
        if slopes.requires_grad:
            fail(ValueError, OP, "alibi_slopes", "a tensor that requires grad", "a constant")


def _masks(
    mask: Any, causal: bool, align: Align, window: Window | None, starts: tuple[int, int]
) -> tuple[MaskSpec, Tensor | None]:
    """Return the structured mask and the dense one."""
    if isinstance(mask, MaskSpec):
        if causal or window is not None:
            got = "a MaskSpec beside causal or window"
            fail(ValueError, OP, "mask", got, "one of them: the MaskSpec says all")
        return mask, None
    if mask is not None:
        check_tensor(OP, "mask", mask)
    left, right = (None, None) if window is None else window
    if causal:
        right = 0 if right is None else min(right, 0)
    start = starts if align == "upper_left" else (0, 0)
    return MaskSpec(left, right, align, (), *start), mask


def _check_prefix(spec: MaskSpec, q: Tensor, layout: str, cu: Tensor | None) -> None:
    sequences = sizes(q, layout)[0] if cu is None else cu.shape[0] - 1
    if len(spec.prefix) not in (0, 1, sequences):
        need = f"one, or {sequences}, one a sequence"
        fail(ValueError, OP, "mask", f"{len(spec.prefix)} prefixes", need)


def _window(spec: MaskSpec) -> list[int]:
    left, right = spec.bounds(1, 3)
    if not spec.edge:
        return [] if left == right == UNBOUNDED else [left, right]
    first = spec.edge == "first"
    return [left, right, *spec.bounds(0 if first else 2, 3), 0 if first else -1]


def _rng(p: float, rng: Tensor | None, q: Tensor, layout: str, head_start: int) -> Tensor | None:
    """Check the dropout; draw seed and offset from torch's generator when none are given."""
    if not 0.0 <= p <= 1.0:
        fail(ValueError, OP, "dropout_p", p, "a probability from 0 to 1")
    if not p:
        return None
    heads = sizes(q, layout)[1]
    if head_start < 0 or head_start + heads > 1 << HEAD_BITS:
        got = f"heads {head_start} to {head_start + heads}"
        fail(ValueError, OP, "head_start", got, f"numbers from 0 to {1 << HEAD_BITS} with dropout")
    if rng is None:
        return torch.randint(0, 2**31, (2,), dtype=torch.int64, device=q.device)
    check_tensor(OP, "dropout_rng", rng)
    if rng.dtype is not torch.int64 or tuple(rng.shape) != (2,):
        need = "torch.int64 (2,), seed and offset"
        fail(ValueError, OP, "dropout_rng", f"{rng.dtype} {tuple(rng.shape)}", need)
    return rng


__all__ = ["Layout", "Window", "prepare"]
