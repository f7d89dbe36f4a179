"""Wrong kernels: the test body must catch each of them."""

from types import SimpleNamespace

import pytest
import torch

from ms_ops.activation import reference as swiglu
from support.mutants import caught


def halves_swapped(x, dim):
    return swiglu.forward(torch.cat(x.chunk(2, dim)[::-1], dim), dim)


def gate_slope_lost(dy, x, dim):
    gate, up = x.chunk(2, dim)
    sigmoid = torch.sigmoid(gate)
    return torch.cat((dy * up * sigmoid, dy * gate * sigmoid), dim)


def bias_added_after(x, bias):
    return swiglu.forward(x, -1) + bias[: bias.shape[0] // 2]


def bias_forgotten_in_backward(dy, x, bias):
    return swiglu.bias_backward(dy, x, torch.zeros_like(bias))


def bias_gradient_rounded_first(dy, x, bias):
    dx = swiglu.bias_backward(dy, x, bias)[0]
    rows = tuple(range(x.dim() - 1))
    return dx, dx.sum(rows) if rows else dx.clone()


def weights_before_the_gate(x, weights):
    return swiglu.forward(x * weights.to(x.dtype), -1)


def weights_missing_in_dx(dy, x, weights):
    dx = swiglu.backward(dy, x, -1)
    return dx, swiglu.weighted_backward(dy, x, weights)[1]


def weight_gradient_with_weights(dy, x, weights):
    dx, dweights = swiglu.weighted_backward(dy, x, weights)
    return dx, dweights * weights


MUTANTS = [
    (halves_swapped, None),
    (None, gate_slope_lost),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward, dtype):
    assert caught("swiglu", dtype, swiglu, forward, backward) > 0


FORMS = {
    "bias_swiglu": (swiglu.bias_forward, swiglu.bias_backward),
    "weighted_swiglu": (swiglu.weighted_forward, swiglu.weighted_backward),
}
WRONG_FORMS = [
    ("bias_swiglu", bias_added_after, None),
    ("bias_swiglu", None, bias_forgotten_in_backward),
    ("bias_swiglu", None, bias_gradient_rounded_first),
    ("weighted_swiglu", weights_before_the_gate, None),
    ("weighted_swiglu", None, weights_missing_in_dx),
    ("weighted_swiglu", None, weight_gradient_with_weights),
]


@pytest.mark.parametrize(
    ("op", "forward", "backward"), WRONG_FORMS, ids=[(f or b).__name__ for _, f, b in WRONG_FORMS]
)
def test_mutant_of_a_form_is_caught(op, forward, backward):
    right = SimpleNamespace(forward=FORMS[op][0], backward=FORMS[op][1])
    assert caught(op, torch.bfloat16, right, forward, backward) > 0
