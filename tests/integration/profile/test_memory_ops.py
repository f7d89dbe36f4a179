"""What the operators of ms-ops keep for backward, to the byte, by census and by hooks."""

import pytest
import torch

import ms_ops
from ms_profile.memory import MemoryMeter, saved_bytes

B, S, HEADS, KV_HEADS, D, F = 2, 12, 4, 2, 8, 40
H, KV, N = HEADS * D, KV_HEADS * D, B * S
DTYPES = [torch.float32, torch.bfloat16]


WEIGHT = {dtype: torch.nn.Parameter(torch.ones(H, dtype=dtype)) for dtype in DTYPES}
ANGLES = torch.arange(S)[:, None, None, None] * torch.ones(D)
TABLES = ANGLES.cos(), ANGLES.sin()


def normed(x):
    return ms_ops.rms_norm(x, WEIGHT[x.dtype])


def rotated(x):
    return ms_ops.rope(x, *TABLES)


def attended(x):
    q, k, v = x.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    return ms_ops.attention(q, k, v, layout="bshd", causal=True)


# Shape of the input; bytes kept by the width of an element, the input among them if it is kept.
OPERATORS = {
    "rms_norm": (normed, (B, S, H), lambda w: w * N * H + 4 * N),
    "swiglu": (ms_ops.swiglu, (B, S, 2 * F), lambda w: w * N * 2 * F),
    "rope": (rotated, (S, B, HEADS, D), lambda w: 0),
    "attention": (
        attended,
        (B, S, HEADS + 2 * KV_HEADS, D),
        lambda w: w * N * (H + 2 * KV) + w * N * H + 4 * N * HEADS,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_kept_bytes(name, dtype):
    function, shape, form = OPERATORS[name]
    leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
    known = [leaf, *TABLES, *WEIGHT.values()]
    with MemoryMeter(exclude=known) as meter, saved_bytes(exclude=known) as hooks:
        y = function(leaf * 1) * 1  # nobody but the graph holds input and result
        mark = meter.mark("forward", outputs=y)
        assert mark.saved == hooks.live == form(dtype.itemsize)
        loss = y.float().sum()
        del y
        loss.backward()
        assert meter.leaks(expected=loss) == ()
