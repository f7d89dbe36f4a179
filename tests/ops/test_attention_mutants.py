"""Wrong kernels: the test body must catch each of them."""

import math

import pytest
import torch

from ms_ops.attention import reference as attention
from support.mutants import caught, replaced


def scale_dropped(q, k, v, mask, causal, scale, layout):
    return attention.forward(q, k, v, mask, causal, 1.0, layout)


def scale_dropped_in_backward(*args):
    return attention.backward(*replaced(args, {8: 1.0}))


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


MUTANTS = [
    (scale_dropped, None),
    (None, scale_dropped_in_backward),
    (None, group_not_summed),
    (lse_in_base_two, None),
    (lse_without_scale, None),
    (lse_zero_in_empty_rows, None),
    (other_corner, None),
    (mask_ignored, None),
    (mask_inverted, None),
    (None, delta_dropped),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward, dtype):
    assert caught("attention", dtype, attention, forward, backward) > 0
