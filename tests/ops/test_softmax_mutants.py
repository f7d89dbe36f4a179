"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.softmax import reference as softmax
from support.mutants import caught


def scale_dropped(x, mask, scale, causal):
    return softmax.forward(x, mask, 1.0, causal)


def mask_inverted(x, mask, scale, causal):
    return softmax.forward(x, None if mask is None else ~mask, scale, causal)


def triangle_ignored(x, mask, scale, causal):
    return softmax.forward(x, mask, scale, False)


def diagonal_left_out(x, mask, scale, causal):
    if causal:
        triangle = torch.ones(x.shape[-2:], dtype=torch.bool).triu(0)
        mask = triangle if mask is None else mask | triangle
    return softmax.forward(x, mask, scale, False)


def average_in_empty_rows(x, mask, scale, causal):
    y = softmax.forward(x, mask, scale, causal)
    return torch.where(y.sum(-1, keepdim=True) == 0, 1 / max(x.shape[-1], 1), y)


def scale_dropped_in_backward(dy, y, mask, scale, causal):
    return softmax.backward(dy, y, mask, 1.0, causal)


def sum_dropped(dy, y, mask, scale, causal):
    return dy * y * scale


MUTANTS = [
    (scale_dropped, None),
    (mask_inverted, None),
    (triangle_ignored, None),
    (diagonal_left_out, None),
    (average_in_empty_rows, None),
    (None, scale_dropped_in_backward),
    (None, sum_dropped),
]


@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward):
    assert caught("scaled_masked_softmax", torch.float32, softmax, forward, backward) > 0
