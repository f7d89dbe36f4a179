"""Wrong kernels: the test body must catch each of them."""

import math

import pytest
import torch

import ms_ops
from ms_ops import testing
from ms_ops.activation import reference as swiglu
from ms_ops.attention import reference as attention
from ms_ops.norm import reference as rms_norm
from ms_ops.rope import reference as rope


def replace(values, **places):
    values = list(values)
    for place, value in places.items():
        values[int(place[1:])] = value
    return values


def scale_dropped(q, k, v, mask, causal, scale, layout):
    return attention.forward(q, k, v, mask, causal, 1.0, layout)


def scale_dropped_in_backward(*args):
    return attention.backward(*replace(args, _8=1.0))


def group_not_summed(dout, q, k, v, out, lse, mask, causal, scale, layout):
    axis = {"bshd": 2, "sbhd": 2, "bhsd": 1}[layout]
    group = q.shape[axis] // k.shape[axis]
    wide_k, wide_v = (t.repeat_interleave(group, axis) for t in (k, v))
    dq, dk, dv = attention.backward(dout, q, wide_k, wide_v, out, lse, mask, causal, scale, layout)
    first = torch.arange(k.shape[axis]) * group
    return dq, dk.index_select(axis, first), dv.index_select(axis, first)


def lse_in_base_two(*args):
    out, lse = attention.forward(*args)
    return out, lse / math.log(2)


def lse_without_scale(q, k, v, mask, causal, scale, layout):
    out, _ = attention.forward(q, k, v, mask, causal, scale, layout)
    return out, attention.forward(q, k, v, mask, causal, 1.0, layout)[1]


def lse_zero_in_empty_rows(*args):
    out, lse = attention.forward(*args)
    return out, lse.masked_fill(lse == -math.inf, 0.0)


def other_corner(q, k, v, mask, causal, scale, layout):
    causal = {"lower_right": "upper_left", "upper_left": "lower_right"}.get(causal, causal)
    return attention.forward(q, k, v, mask, causal, scale, layout)


def mask_ignored(q, k, v, mask, causal, scale, layout):
    return attention.forward(q, k, v, None, causal, scale, layout)


def mask_inverted(q, k, v, mask, causal, scale, layout):
    mask = None if mask is None else ~mask
    return attention.forward(q, k, v, mask, causal, scale, layout)


def delta_dropped(dout, q, k, v, out, lse, *rest):
    return attention.backward(dout, q, k, v, torch.zeros_like(out), lse, *rest)


def offset_ignored(x, weight, eps, offset, casting):
    return rms_norm.forward(x, weight, eps, 0.0, casting)


def eps_ignored(x, weight, eps, offset, casting):
    return rms_norm.forward(x, weight, 0.1, offset, casting)


def mean_dropped(dy, x, weight, rstd, offset, casting):
    _, dweight = rms_norm.backward(dy, x, weight, rstd, offset, casting)
    return (dy * rstd * (weight + offset)).to(x.dtype).contiguous(), dweight


def row_lost(dy, x, weight, rstd, offset, casting):
    dx, _ = rms_norm.backward(dy, x, weight, rstd, offset, casting)
    dy = dy.clone()
    dy[:1] = 0
    return dx, rms_norm.backward(dy, x, weight, rstd, offset, casting)[1]


def variance_returned(*args):
    y, rstd = rms_norm.forward(*args)
    return y, rstd.pow(-2)


def halves_swapped(x, dim):
    return swiglu.forward(torch.cat(x.chunk(2, dim)[::-1], dim), dim)


def gate_slope_lost(dy, x, dim):
    gate, up = x.chunk(2, dim)
    sigmoid = torch.sigmoid(gate)
    return torch.cat((dy * up * sigmoid, dy * gate * sigmoid), dim)


def not_transposed(dy, cos, sin, interleaved):
    return rope.forward(dy, cos, sin, interleaved)


def other_pairs(x, cos, sin, interleaved):
    return rope.forward(x, cos, sin, not interleaved)


def rest_forgotten(x, cos, sin, interleaved):
    y = rope.forward(x, cos, sin, interleaved)
    y[..., cos.shape[-1] :] = 0
    return y


MUTANTS = [
    ("attention", scale_dropped, None),
    ("attention", None, scale_dropped_in_backward),
    ("attention", None, group_not_summed),
    ("attention", lse_in_base_two, None),
    ("attention", lse_without_scale, None),
    ("attention", lse_zero_in_empty_rows, None),
    ("attention", other_corner, None),
    ("attention", mask_ignored, None),
    ("attention", mask_inverted, None),
    ("attention", None, delta_dropped),
    ("rms_norm", offset_ignored, None),
    ("rms_norm", eps_ignored, None),
    ("rms_norm", None, mean_dropped),
    ("rms_norm", None, row_lost),
    ("rms_norm", variance_returned, None),
    ("swiglu", halves_swapped, None),
    ("swiglu", None, gate_slope_lost),
    ("rope", None, not_transposed),
    ("rope", other_pairs, None),
    ("rope", rest_forgotten, None),
]
RIGHT = {"attention": attention, "rms_norm": rms_norm, "swiglu": swiglu, "rope": rope}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "forward", "backward"), MUTANTS, ids=[(f or b).__name__ for _, f, b in MUTANTS]
)
def test_mutant_is_caught(op, forward, backward, dtype):
    right = RIGHT[op]
    kernel = ms_ops.Kernel(forward or right.forward, backward or right.backward)
    ms_ops.register_backend(op, ms_ops.Backend("mutant", 500, {op: kernel}))
    caught = 0
    try:
        for sample in testing.OPERATORS[op].samples(dtype):
            try:
                testing.check_values(op, sample, "mutant")
            except AssertionError:
                caught += 1
    finally:
        ms_ops.unregister_backend(op, "mutant")
    assert caught > 0


@pytest.mark.parametrize("op", RIGHT)
def test_the_unchanged_kernel_passes_as_a_third_party_backend(op):
    kernel = ms_ops.Kernel(RIGHT[op].forward, RIGHT[op].backward)
    ms_ops.register_backend(op, ms_ops.Backend("guest", 500, {op: kernel}))
    try:
        assert testing.check_backend(op, "guest", dtypes=[torch.float32]) > 20
    finally:
        ms_ops.unregister_backend(op, "guest")
