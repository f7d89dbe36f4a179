"""Attention beyond the samples: layouts bit by bit, outside statistics, alignment, bad rows."""

import math

import pytest
import torch

import ms_ops

ORDERS = {"sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}


def qkv(rows=9, keys=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, rows, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("layout", ORDERS)
def test_layouts_agree_bit_for_bit(layout, backend):
    order = ORDERS[layout]
    with ms_ops.backend(backend):
        tensors = qkv()
        base, lse = ms_ops.attention(*tensors, causal=True, return_lse=True)
        moved = [t.permute(order) for t in tensors]
        out, other = ms_ops.attention(*moved, layout=layout, causal=True, return_lse=True)
    assert torch.equal(out.permute(order), base)
    assert torch.equal(lse, other)
    dy = torch.randn_like(base)
    one = torch.autograd.grad(base, tensors, dy)
    two = torch.autograd.grad(out, tensors, dy.permute(order))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_parts_of_the_keys_with_the_statistics_of_all():
    q, k, v = qkv(7, 12, torch.float64)
    out, lse = ms_ops.attention(q, k, v, return_lse=True)
    dy = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dy)
    parts = [
        ms_ops.attention_backward(dy, q, k[:, a:b], v[:, a:b], out.detach(), lse)
        for a, b in ((0, 5), (5, 12))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], dq, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), dk, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 1), dv, rtol=1e-12, atol=1e-13)


def test_alignment_of_the_triangle():
    lower = ms_ops.causal_mask(2, 4, "lower_right", torch.device("cpu"))
    upper = ms_ops.causal_mask(2, 4, "upper_left", torch.device("cpu"))
    assert lower.tolist() == [[True, True, True, False], [True] * 4]
    assert upper.tolist() == [[True, False, False, False], [True, True, False, False]]


def test_default_alignment_continues_a_cache():
    q, k, v = qkv(9, 9)
    whole = ms_ops.attention(q, k, v, causal=True)
    last = ms_ops.attention(q[:, 6:], k, v, causal=True)
    torch.testing.assert_close(last, whole[:, 6:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_rows_without_keys(backend):
    q, k, v = qkv(6, 4)
    with ms_ops.backend(backend):
        out, lse = ms_ops.attention(q, k, v, causal=True, return_lse=True)
        grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert (lse[:, :, :2] == -math.inf).all()
    assert torch.equal(grads[0][:, :2], torch.zeros_like(q[:, :2]))
    assert all(g.isfinite().all() for g in grads)


def test_agrees_with_torch():
    q, k, v = (t.transpose(1, 2) for t in qkv())
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    ours = ms_ops.attention(q, k, v, layout="bhsd", causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
