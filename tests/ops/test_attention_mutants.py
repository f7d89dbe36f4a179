"""Wrong kernels: the test body must catch each of them."""

import math

import pytest
import torch

from ms_ops.attention import reference as attention
from ms_ops.attention.call import Call
from ms_ops.attention.merge import reference as merge
from support.mutants import caught


def changed(**fields):
    """A forward that works with other arguments than it was given."""

    def forward(q, k, v, *rest):
        return attention.forward(q, k, v, *Call(*rest)._replace(**fields))

    return forward


def changed_backward(**fields):
    def backward(*args):
        call = Call(*args[6:-1])._replace(**fields)
        return attention.backward(*args[:6], *call, args[-1])

    return backward


def derived(change):
    """A forward with arguments that `change` makes from those it was given."""

    def forward(q, k, v, *rest):
        call = Call(*rest)
        return attention.forward(q, k, v, *call._replace(**change(call)))

    return forward


def group_not_summed(dout, q, k, v, out, lse, *rest):
    layout = rest[-2]
    axis = {"bshd": 2, "sbhd": 2, "bhsd": 1, "thd": 1}[layout]
    group = q.shape[axis] // k.shape[axis]
    wide_k, wide_v = (t.repeat_interleave(group, axis) for t in (k, v))
    dq, dk, dv, *others = attention.backward(dout, q, wide_k, wide_v, out, lse, *rest)
    first = torch.arange(k.shape[axis]) * group
    return dq, dk.index_select(axis, first), dv.index_select(axis, first), *others


def lse_in_base_two(*args):
    out, lse = attention.forward(*args)
    return out, lse / math.log(2)


def lse_zero_in_empty_rows(*args):
    out, lse = attention.forward(*args)
    return out, lse.masked_fill(lse == -math.inf, 0.0)


def lse_without_sink(q, k, v, *rest):
    alone = Call(*rest)._replace(sink=None)
    return attention.forward(q, k, v, *rest)[0], attention.forward(q, k, v, *alone)[1]


def delta_dropped(dout, q, k, v, out, lse, *rest):
    return attention.backward(dout, q, k, v, torch.zeros_like(out), lse, *rest)


def factor_of_the_bias_gradient_lost(*args):
    *grads, dbias, dsink = attention.backward(*args)
    return *grads, dbias / (Call(*args[6:-1]).bias_factor or 1.0), dsink


def other_corner(call):
    return {"corner": {"lower_right": "upper_left"}.get(call.corner, "lower_right")}


def bounds_swapped(call):
    return {"window": [*call.window[1::-1], *call.window[2:]]}


def mask_inverted(call):
    return {"mask": None if call.mask is None else ~call.mask}


def sequences_joined(call):
    if call.cu_q is None:
        return {}
    return {"cu_q": call.cu_q[[0, -1]], "cu_k": call.cu_k[[0, -1]], "prefix": call.prefix[:1]}


def edge_elsewhere(call):
    return {"window": call.window[:4] + [1 + w for w in call.window[4:]]}


def other_seed(call):
    return {"rng": None if call.rng is None else call.rng + 1}


WRONG_FORWARD = {
    "scale_dropped": changed(scale=1.0),
    "other_corner": derived(other_corner),
    "bounds_swapped": derived(bounds_swapped),
    "window_ignored": changed(window=[]),
    "edge_elsewhere": derived(edge_elsewhere),
    "prefix_ignored": changed(prefix=[]),
    "mask_ignored": changed(mask=None),
    "mask_inverted": derived(mask_inverted),
    "bias_ignored": changed(bias=None),
    "bias_not_scaled": changed(bias_factor=1.0),
    "slopes_ignored": changed(slopes=None),
    "root_ignored": changed(root=False),
    "starts_ignored_by_alibi": changed(slope_shift=0),
    "sink_ignored": changed(sink=None),
    "lse_without_sink": lse_without_sink,
    "dropout_not_rescaled": changed(dropout_p=0.0),
    "other_seed": derived(other_seed),
    "sequences_joined": derived(sequences_joined),
    "lse_in_base_two": lse_in_base_two,
    "lse_zero_in_empty_rows": lse_zero_in_empty_rows,
}
WRONG_BACKWARD = {
    "scale_dropped": changed_backward(scale=1.0),
    "mask_ignored": changed_backward(mask=None),
    "window_ignored": changed_backward(window=[]),
    "dropout_forgotten": changed_backward(dropout_p=0.0),
    "group_not_summed": group_not_summed,
    "delta_dropped": delta_dropped,
    "factor_of_the_bias_gradient_lost": factor_of_the_bias_gradient_lost,
}


@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_wrong_forward_is_caught(name):
    assert caught("attention", torch.float32, attention, WRONG_FORWARD[name], None) > 0


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_wrong_backward_is_caught(name):
    assert caught("attention", torch.float32, attention, None, WRONG_BACKWARD[name]) > 0


def weights_not_normalised(out1, lse1, out2, lse2, layout):
    out, lse = merge.forward(out1, lse1, out2, lse2, layout)
    return out * 2, lse


def parts_averaged(out1, lse1, out2, lse2, layout):
    return ((out1 + out2) / 2).to(out1.dtype), torch.logaddexp(lse1, lse2)


def larger_sum_only(out1, lse1, out2, lse2, layout):
    out, _ = merge.forward(out1, lse1, out2, lse2, layout)
    return out, torch.maximum(lse1, lse2)


def weights_held_constant(dout, dlse, out1, lse1, out2, lse2, out, lse, layout):
    grads = merge.backward(dout, dlse, out1, lse1, out2, lse2, out, lse, layout)
    return grads[0], torch.zeros_like(lse1), grads[2], torch.zeros_like(lse2)


def gradient_of_the_sum_lost(dout, dlse, *rest):
    return merge.backward(dout, torch.zeros_like(dlse), *rest)


MERGES = [
    (weights_not_normalised, None),
    (parts_averaged, None),
    (larger_sum_only, None),
    (None, weights_held_constant),
    (None, gradient_of_the_sum_lost),
]


@pytest.mark.parametrize(
    ("forward", "backward"), MERGES, ids=[(f or b).__name__ for f, b in MERGES]
)
def test_wrong_merge_is_caught(forward, backward):
    assert caught("attention_merge", torch.float32, merge, forward, backward) > 0
