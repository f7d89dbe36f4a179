"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.norm import reference as rms_norm
from support.mutants import caught


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


MUTANTS = [
    (offset_ignored, None),
    (eps_ignored, None),
    (None, mean_dropped),
    (None, row_lost),
    (variance_returned, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward, dtype):
    assert caught("rms_norm", dtype, rms_norm, forward, backward) > 0
