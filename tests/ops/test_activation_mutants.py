"""Wrong kernels: the test body must catch each of them."""

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
