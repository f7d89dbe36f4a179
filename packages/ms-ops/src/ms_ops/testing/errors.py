"""Calls that every backend must refuse, with the same message."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .samples import ErrorSample, maker


def rms_norm() -> Iterator[ErrorSample]:
    """Yield calls of `rms_norm_with_rstd` that must raise."""
    make = maker(torch.float32, "cpu")
    x, weight = make(4, 8), make(8)
    yield ErrorSample("list", ([1.0], weight), TypeError, "x: got list, need a torch.Tensor")
    yield ErrorSample("ints", (x.long(), weight), TypeError, "x: got torch.int64")
    yield ErrorSample("low_weight", (x, weight.half()), TypeError, "weight: got torch.float16")
    yield ErrorSample(
        "mixed", (x.bfloat16(), weight.half()), TypeError, "weight: got torch.float16"
    )
    yield ErrorSample("size", (x, make(4)), ValueError, "need the trailing dimensions of x (4, 8)")
    yield ErrorSample("dims", (make(8), x), ValueError, "weight: got 2 dimensions, need 1 to 1")
    yield ErrorSample("empty", (make(4, 0), make(0)), ValueError, "no empty dimension")
    yield ErrorSample("eps", (x, weight, -1.0), ValueError, "eps: got -1.0, need 0 or more")
    yield ErrorSample(
        "casting", (x, weight), ValueError, "need one of 'fp32', 'llama'", {"casting": "none"}
    )
    yield ErrorSample("device", (x, weight.to("meta")), RuntimeError, "need all tensors on one")


def swiglu() -> Iterator[ErrorSample]:
    """Yield calls of `swiglu` that must raise."""
    make = maker(torch.float32, "cpu")
    yield ErrorSample("list", ([1.0],), TypeError, "x: got list")
    yield ErrorSample("ints", (make(4).long(),), TypeError, "x: got torch.int64")
    yield ErrorSample("odd", (make(4, 7),), ValueError, "got size 7 in dim -1, need an even size")
    yield ErrorSample(
        "dim", (make(4, 8), 2), ValueError, "dim: got 2, need a dimension of x (4, 8)"
    )
    yield ErrorSample("scalar", (make(),), ValueError, "dim: got -1")


def rope() -> Iterator[ErrorSample]:
    """Yield calls of `rope` that must raise."""
    make = maker(torch.float32, "cpu")
    x, trig = make(5, 2, 3, 8), make(5, 1, 1, 8)
    grad = trig.clone().requires_grad_()
    yield ErrorSample("list", (x, [1.0], trig), TypeError, "cos: got list")
    yield ErrorSample("ints", (x.long(), trig, trig), TypeError, "x: got torch.int64")
    yield ErrorSample("trig_dtype", (x, trig, trig.half()), TypeError, "sin: got torch.float16")
    yield ErrorSample("trig_shape", (x, trig, make(5, 1, 1, 6)), ValueError, "need cos's shape")
    yield ErrorSample("dims", (x, make(5, 8), make(5, 8)), ValueError, "cos: got 2 dimensions")
    yield ErrorSample("rows", (x, make(4, 1, 1, 8), make(4, 1, 1, 8)), ValueError, "sizes 1 or")
    yield ErrorSample("odd", (x, make(5, 1, 1, 7), make(5, 1, 1, 7)), ValueError, "an even last")
    yield ErrorSample("wide", (x, make(5, 1, 1, 10), make(5, 1, 1, 10)), ValueError, "at most 8")
    yield ErrorSample("one_grad", (x, grad, trig), ValueError, "gradients for both or neither")
    yield ErrorSample("device", (x, trig.to("meta"), trig.to("meta")), RuntimeError, "one device")


def attention() -> Iterator[ErrorSample]:
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
