"""Grouped products beyond the samples: accumulators, saved bytes, FLOPs, host and device lists."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ms_ops
from ms_ops.matmul import portable
from support.mutation import Mutation, assert_caught

ENDS = torch.tensor([3, 3, 10])


def operands(transposed=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(10, 8, generator=generator, dtype=dtype)
    weight = torch.randn(3, 8, 6, generator=generator, dtype=dtype)
    weight = weight.transpose(1, 2).contiguous() if transposed else weight
    dy = torch.randn(10, 6, generator=generator, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


def check_accumulator(transposed):
    x, weight, dy = operands(transposed)
    plain = ms_ops.grouped_matmul(x, weight, ENDS, transpose_weight=transposed)
    dx, dweight = torch.autograd.grad(plain, (x, weight), dy)
    start = torch.randn_like(weight)
    acc = start.clone().view(-1)
    for step in (1, 2):
        y = ms_ops.grouped_matmul(x, weight, ENDS, transpose_weight=transposed, accumulate_into=acc)
        x.grad = None
        y.backward(dy)
        assert torch.equal(y, plain)
        torch.testing.assert_close(x.grad, dx)
        assert weight.grad is None
        torch.testing.assert_close(acc.view_as(weight), start + step * dweight)


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_are_added_to_the_accumulator(transposed):
    check_accumulator(transposed)


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "accumulator not given",
            "ms_ops.matmul.grouped:_Accumulating.backward",
            "grouped_matmul_add_(ctx.acc, ",
            "grouped_matmul_add_(ctx.acc.clone(), ",
        ),
        Mutation(
            "matrices not turned",
            "ms_ops.matmul.grouped:_Accumulating.backward",
            "first, last = (dy, x) if ctx.transposed else (x, dy)",
            "first, last = x, dy",
        ),
    ],
    ids=lambda m: m.name,
)
def test_a_wrong_accumulation_is_caught(mutation):
    assert_caught(mutation, lambda: check_accumulator(True))


def test_a_frozen_weight_leaves_the_accumulator():
    x, weight, dy = operands()
    acc = torch.zeros_like(weight)
    ms_ops.grouped_matmul(x, weight.detach(), ENDS, accumulate_into=acc).backward(dy)
    assert not acc.any()
    assert x.grad is not None


def test_an_accumulator_holds_what_the_dtype_of_the_inputs_cannot():
    x, weight, dy = operands(dtype=torch.bfloat16)
    acc = torch.full(weight.shape, 100.0)
    ms_ops.grouped_matmul(x, weight, ENDS, accumulate_into=acc).backward(dy)
    wide, grad = x.detach().double(), dy.double()
    want = torch.stack([wide[a:b].t() @ grad[a:b] for a, b in ((0, 3), (3, 3), (3, 10))])
    torch.testing.assert_close(acc.double() - 100, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_a_gradient_needs_is_saved(frozen):
    x, weight, _ = operands()
    tensors = {"x": x, "weight": weight}
    tensors[frozen] = tensors[frozen].detach()
    kept = set()

    def pack(tensor):
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ms_ops.grouped_matmul(tensors["x"], tensors["weight"], ENDS)
    assert kept == {tensors[frozen].data_ptr(), ENDS.data_ptr()}


def test_flops_of_forward_and_backward():
    x, weight, dy = operands()
    product = 2 * 10 * 8 * 6
    ms_ops.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        ms_ops.grouped_matmul(x, weight, ENDS).backward(dy)
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        ms_ops.matmul_add_(torch.zeros(6, 8).double(), x.detach(), dy)
        ms_ops.grouped_matmul_add_(torch.zeros(3, 8, 6).double(), x.detach(), dy, ENDS)
    assert counter.get_total_flops() == 2 * product


def test_sizes_and_lists_mean_the_same_as_ends():
    x, weight, _ = operands()
    plain = ms_ops.grouped_matmul(x, weight, ENDS)
    for kwargs in ({"offsets": [3, 3, 10]}, {"group_sizes": [3, 0, 7]}):
        assert torch.equal(ms_ops.grouped_matmul(x, weight, **kwargs), plain)


def test_autocast_casts_rows_and_matrices():
    x, weight, dy = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ms_ops.grouped_matmul(x, weight, ENDS)
    assert torch.equal(y, ms_ops.grouped_matmul(x.bfloat16(), weight.bfloat16(), ENDS))
    y.backward(dy.bfloat16())
    assert weight.grad.dtype is torch.float32


@pytest.mark.parametrize("transposed", [False, True])
def test_torchs_grouped_product_agrees(monkeypatch, transposed):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(11, 8, generator=generator).bfloat16()
    weight = torch.randn(4, 8, 16, generator=generator).bfloat16()
    weight = weight.transpose(1, 2).contiguous() if transposed else weight
    args = (x[:, :], weight, torch.tensor([2, 2, 9, 11]), None, transposed)
    plain = portable.forward(*args)
    calls = []
    monkeypatch.setattr(portable, "_grouped", lambda *tensors: not calls.append(tensors))
    try:
        grouped = portable.forward(*args)
    except NotImplementedError:
        pytest.skip("torch has its grouped product for CUDA only")
    assert len(calls) == 1
    torch.testing.assert_close(grouped, plain)


def quantised():
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(10, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randint(-127, 128, (3, 8, 6), generator=generator, dtype=torch.int8)
    scale, shift, bias = (torch.randn(3, 6, generator=generator).bfloat16() for _ in range(3))
    return x, weight, scale, shift, bias


def check_weight_quant():
    x, weight, scale, shift, bias = quantised()
    y = ms_ops.weight_quant_grouped_matmul(x, weight, scale, ENDS, weight_offset=shift, bias=bias)
    wide = (weight.double() + shift.double()[:, None]) * scale.double()[:, None]
    matrices = wide.bfloat16()
    assert torch.equal(y, ms_ops.grouped_matmul(x, matrices, ENDS, bias=bias))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    want = ms_ops.grouped_matmul(dy, matrices, ENDS, transpose_weight=True)
    assert torch.equal(dx, want)


def test_weights_of_8_bits():
    check_weight_quant()


@pytest.mark.parametrize("old", ["wide += ", ".mul_(scale.unsqueeze(1))"])
def test_a_wrong_weight_is_caught(old):
    new = "wide = wide - " if "+=" in old else ""
    mutation = Mutation(old, "ms_ops.matmul.weight_quant:matrices", old, new)
    assert_caught(mutation, check_weight_quant)
