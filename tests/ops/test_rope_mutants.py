"""Wrong kernels: the test body must catch each of them."""

import pytest
import torch

from ms_ops.rope import reference as rope
from support.mutants import caught


def not_transposed(dy, cos, sin, interleaved):
    return rope.forward(dy, cos, sin, interleaved)


def other_pairs(x, cos, sin, interleaved):
    return rope.forward(x, cos, sin, not interleaved)


def rest_forgotten(x, cos, sin, interleaved):
    y = rope.forward(x, cos, sin, interleaved)
    y[..., cos.shape[-1] :] = 0
    return y


MUTANTS = [
    (None, not_transposed),
    (other_pairs, None),
    (rest_forgotten, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("forward", "backward"), MUTANTS, ids=[(f or b).__name__ for f, b in MUTANTS]
)
def test_mutant_is_caught(forward, backward, dtype):
    assert caught("rope", dtype, rope, forward, backward) > 0
