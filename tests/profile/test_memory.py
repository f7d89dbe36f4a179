"""Saved bytes against closed forms, to the byte."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ms_profile.memory import saved_bytes

S, B, H, FFN = 12, 3, 16, 40
TOKENS = S * B


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(H, FFN), nn.GELU(), nn.Linear(FFN, H)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gelu_mlp(dtype):
    width = torch.empty((), dtype=dtype).element_size()
    x = torch.randn(S, B, H, dtype=dtype, requires_grad=True)
    with saved_bytes() as meter:
        y = mlp(dtype)(x)
    assert meter.total == width * TOKENS * (H + 2 * FFN)
    assert meter.count == 3
    assert meter.live == meter.peak == meter.total
    y.sum().backward()
    del y
    # Only the input is still alive: the caller holds it.
    assert meter.live == width * TOKENS * H


def test_eager_swiglu_mlp():
    up, down = nn.Linear(H, 2 * FFN, bias=False), nn.Linear(FFN, H, bias=False)
    x = torch.randn(TOKENS, H, requires_grad=True)
    with saved_bytes() as meter:
        gate, value = up(x).chunk(2, dim=-1)
        y = down(F.silu(gate) * value)
    assert meter.total == 4 * TOKENS * (H + 2 * FFN + FFN + FFN)
    y.sum().backward()


def test_layer_norm_saves_input_and_two_statistics():
    x = torch.randn(TOKENS, H, requires_grad=True)
    norm = nn.LayerNorm(H)
    with saved_bytes() as meter:
        norm(x)
    assert meter.total == 4 * TOKENS * (H + 2)


def test_views_of_one_storage_count_once():
    x = torch.randn(TOKENS, H, requires_grad=True)
    with saved_bytes() as meter:
        (x[:5].sin().sum() + x[5:].sin().sum()).backward()
    assert meter.total == 4 * TOKENS * H


def test_excluded_input_and_buffer():
    x = torch.randn(TOKENS, H, requires_grad=True)
    model = nn.Linear(H, H)
    model.register_buffer("scale", torch.rand(TOKENS, H))
    with saved_bytes(exclude=[x, model]) as meter:
        model(x) * model.scale
    assert meter.total == 0


def test_no_grad_saves_nothing():
    with saved_bytes() as meter, torch.no_grad():
        mlp()(torch.randn(TOKENS, H))
    assert (meter.total, meter.peak, meter.count) == (0, 0, 0)


def test_peak_of_accumulated_micro_batches_is_one_micro_batch():
    model = mlp()
    inputs = [torch.randn(TOKENS, H) for _ in range(3)]
    one = 4 * TOKENS * (H + 2 * FFN)
    hidden = 4 * TOKENS * 2 * FFN
    with saved_bytes() as meter:
        for x in inputs:
            model(x).sum().backward()
    # The first layer keeps its input even though that needs no gradient: for the weight's.
    assert meter.total == 3 * one
    # Inputs outlive backward because the caller holds them; the rest is freed each time.
    assert meter.peak == 3 * 4 * TOKENS * H + hidden
    assert meter.live == 3 * 4 * TOKENS * H


def test_peak_of_pipelined_micro_batches_is_their_sum():
    model = mlp()
    inputs = [torch.randn(TOKENS, H) for _ in range(2)]
    with saved_bytes(exclude=inputs) as meter:
        losses = [model(x).sum() for x in inputs]
        for loss in losses:
            loss.backward()
    assert meter.peak == 2 * 4 * TOKENS * 2 * FFN
    del loss, losses
    assert meter.live == 0


def test_outer_counts_what_inner_sees():
    model = mlp()
    x = torch.randn(TOKENS, H)
    with saved_bytes() as outer:
        first = model[0](x)
        with saved_bytes() as inner:
            second = model[1](first)
        model[2](second)
    assert inner.total == 4 * TOKENS * FFN
    assert outer.total == 4 * TOKENS * (H + 2 * FFN)


def test_reentrant_checkpoint_keeps_its_input_then_recomputes():
    model = mlp()
    x = torch.randn(TOKENS, H, requires_grad=True)
    hidden = 4 * TOKENS * 2 * FFN
    with saved_bytes(exclude=x) as meter:
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
        assert meter.total == 0
        y.sum().backward()
    assert meter.peak in (hidden, hidden + 4 * TOKENS * H)


def test_gradients_are_bitwise_the_same():
    model = mlp()
    x = torch.randn(TOKENS, H)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with saved_bytes():
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_no_effect_outside_and_no_leak():
    packed = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            packed.append(len(ctx.saved_tensors))
            return grad * 2

    with saved_bytes() as meter:
        pass
    x = torch.ones(8, requires_grad=True)
    Probe.apply(x).sum().backward()
    assert packed == [1]
    assert meter.total == 0
    with saved_bytes() as meter:
        y = x.sin().exp()
    del y
    gc.collect()
    assert meter.live == 32  # the caller's x


def test_exception_leaves_no_hook():
    with pytest.raises(RuntimeError, match="inside"), saved_bytes():
        raise RuntimeError("inside")
    with saved_bytes() as meter:
        torch.ones(4, requires_grad=True).sin()
    assert meter.total == 16
