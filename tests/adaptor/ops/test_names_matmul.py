"""The operator names of MindSpeed for products and permutation: signatures, values, errors."""

import inspect

import pytest
import torch

import ms_ops
from mindspeed.ops.ffn import npu_ffn
from mindspeed.ops.gmm import npu_gmm, npu_gmm_v2
from mindspeed.ops.npu_groupmatmul_add import npu_groupmatmul_add_fp32
from mindspeed.ops.npu_matmul_add import npu_matmul_add_fp16, npu_matmul_add_fp32
from mindspeed.ops.npu_moe_token_permute import npu_moe_token_permute
from mindspeed.ops.npu_moe_token_unpermute import npu_moe_token_unpermute
from mindspeed.ops.quant_gmm import npu_quant_gmm, npu_quant_gmm_v2
from mindspeed.ops.weight_quant_gmm import npu_weight_quant_gmm, npu_weight_quant_gmm_v2

ENDS = torch.tensor([2, 2, 7])
SIZES = torch.tensor([2, 0, 5])


def operands():
    generator = torch.Generator().manual_seed(4)
    shapes = ((7, 8), (3, 8, 6), (7, 6))
    x, weight, dy = (torch.randn(s, generator=generator) for s in shapes)
    return x.requires_grad_(), torch.nn.Parameter(weight), dy


GMM = ["x", "weight", "bias", "group_list", "group_type", "gemm_fusion", "original_weight"]
SCALES = ["antiquant_scale1", "antiquant_scale2", "antiquant_offset1", "antiquant_offset2"]
FFN = [
    *("x", "weight1", "weight2", "activation", "expert_tokens", "expert_tokens_index"),
    *("bias1", "bias2", "scale", "offset", "deq_scale1", "deq_scale2", *SCALES),
    *("inner_precise", "output_dtype"),
]
QUANT = ["x", "weight", "scale", "offset", "per_token_scale", "bias", "group_list"]
WEIGHT = ["x", "weight", "antiquant_scale", "antiquant_offset", "bias", "group_list", "act_type"]
SIGNATURES = {
    npu_quant_gmm: [*QUANT, "output_dtype", "act_type"],
    npu_quant_gmm_v2: [*QUANT, "output_dtype", "act_type"],
    npu_weight_quant_gmm: WEIGHT,
    npu_weight_quant_gmm_v2: WEIGHT,
    npu_ffn: FFN,
    npu_gmm: GMM,
    npu_gmm_v2: GMM,
    npu_matmul_add_fp32: ["total_input", "grad_output", "grad"],
    npu_matmul_add_fp16: ["total_input", "grad_output", "grad"],
    npu_groupmatmul_add_fp32: ["x", "dy", "grouplist", "grad"],
    npu_moe_token_permute: ["tokens", "indices", "num_out_tokens", "padded_mode"],
    npu_moe_token_unpermute: [
        "permuted_tokens",
        "sorted_indices",
        "probs",
        "padded_mode",
        "restore_shape",
    ],
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


def test_options_of_gmm_are_keywords():
    kinds = [p.kind for p in inspect.signature(npu_gmm).parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * 5


@pytest.mark.parametrize("groups", [ENDS, ENDS.tolist(), None], ids=["tensor", "list", "sizes"])
def test_gmm_multiplies_groups(groups):
    x, weight, dy = operands()
    if groups is None:
        y = npu_gmm_v2(x, weight, group_list=SIZES)
    else:
        y = npu_gmm(x, weight, group_list=groups)
    want = torch.cat([x[:2] @ weight[0], x[2:] @ weight[2]])
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y, (x, weight), dy)
    torch.testing.assert_close(got, torch.autograd.grad(want, (x, weight), dy))


def test_gmm_sums_over_groups():
    x, _, dy = operands()
    got = npu_gmm(x.detach().t(), dy, group_list=ENDS, group_type=2)
    want = ms_ops.grouped_matmul_add_(torch.zeros(3, 8, 6), x.detach(), dy, ENDS)
    assert torch.equal(got, want)


@pytest.mark.parametrize("zero", [None, True, False], ids=["plain", "zeros", "any"])
def test_gmm_adds_to_the_main_gradient(zero):
    x, weight, dy = operands()
    plain = npu_gmm(x, weight, group_list=ENDS)
    dx, dweight = torch.autograd.grad(plain, (x, weight), dy)
    weight.main_grad = torch.ones(weight.numel())
    if zero is not None:
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, zero
    npu_gmm(
        x, weight.view(3, 8, 6), group_list=ENDS, gemm_fusion=True, original_weight=weight
    ).backward(dy)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(weight.main_grad.view_as(weight), dweight + 1)
    if zero is None:
        assert weight.grad is None
    else:
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape
        assert not zero or not weight.grad.any()


def test_gmm_refuses():
    x, weight, _ = operands()
    with pytest.raises(ValueError, match="npu_gmm: group_type: got 1, need one of 0, 2"):
        npu_gmm(x, weight, group_list=ENDS, group_type=1)
    with pytest.raises(ValueError, match="need a parameter with main_grad"):
        npu_gmm(x, weight, group_list=ENDS, gemm_fusion=True, original_weight=weight)
    with pytest.raises(TypeError, match="npu_gmm_v2: group_list: got list"):
        npu_gmm_v2(x, weight, group_list=SIZES.tolist())
    with pytest.raises(ValueError, match="tensors without gradients"):
        npu_gmm(x.t(), x, group_list=ENDS, group_type=2)


def test_matmul_add():
    x, _, dy = operands()
    x = x.detach()
    acc = torch.ones(6, 8)
    assert npu_matmul_add_fp32(x.bfloat16(), dy.bfloat16(), acc) is None
    want = 1 + dy.bfloat16().float().t() @ x.bfloat16().float()
    torch.testing.assert_close(acc, want)
    low = torch.ones(6, 8).half()
    npu_matmul_add_fp16(x.half(), dy.half(), low)
    torch.testing.assert_close(low.float(), 1 + dy.t() @ x, rtol=5e-3, atol=5e-3)


def test_group_matmul_add():
    x, _, dy = operands()
    acc = torch.ones(3 * 8 * 6)
    npu_groupmatmul_add_fp32(x.detach(), dy, ENDS, acc)
    want = torch.stack([x[a:b].t() @ dy[a:b] for a, b in ((0, 2), (2, 2), (2, 7))])
    torch.testing.assert_close(acc.view(3, 8, 6), 1 + want.detach())


def test_permute_and_back():
    x = operands()[0]
    indices = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2], [0, 2]])
    probs = torch.rand(7, 2)
    permuted, order = npu_moe_token_permute(x, indices)
    assert order.dtype is torch.int32
    out = npu_moe_token_unpermute(permuted, order, probs)
    torch.testing.assert_close(out, x * probs.sum(1, keepdim=True))
    assert npu_moe_token_permute(x, indices, 5)[0].shape == (5, 8)
    for call in (
        lambda: npu_moe_token_permute(x, indices, padded_mode=True),
        lambda: npu_moe_token_unpermute(permuted, order, probs, True),
    ):
        with pytest.raises(ValueError, match="padded_mode: got True, need False"):
            call()


def test_ffn():
    x, weight, _ = operands()
    second = weight.detach().transpose(1, 2)
    plain = ms_ops.ffn(x, weight, second, "silu", offsets=ENDS)
    assert torch.equal(npu_ffn(x, weight, second, "silu", expert_tokens_index=ENDS), plain)
    assert torch.equal(npu_ffn(x, weight, second, "silu", expert_tokens=SIZES), plain)
    for kwargs, message in (
        ({"scale": torch.ones(1)}, "scale: got a tensor, need None"),
        ({"output_dtype": torch.half}, "output_dtype: got torch.float16"),
        ({"inner_precise": 2}, "inner_precise: got 2"),
        ({"expert_tokens": SIZES}, "got both lists"),
    ):
        with pytest.raises(ValueError, match=f"npu_ffn: .*{message}|{message}"):
            npu_ffn(x, weight, second, "silu", expert_tokens_index=ENDS, **kwargs)


def integers():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (7, 8), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (3, 8, 6), generator=generator, dtype=torch.int8)
    return x, weight, torch.rand(3, 6, generator=generator) / 100


@pytest.mark.parametrize("number", [0, 1, 2, 4, 5])
def test_quant_gmm(number):
    x, weight, scale = integers()
    tokens = torch.rand(7)
    kwargs = {"per_token_scale": tokens, "output_dtype": torch.bfloat16, "act_type": number}
    y = npu_quant_gmm(x, weight, scale, group_list=ENDS, **kwargs)
    assert torch.equal(y, npu_quant_gmm_v2(x, weight, scale, group_list=SIZES, **kwargs))
    sums = torch.cat([x[:2].float() @ weight[0].float(), x[2:].float() @ weight[2].float()])
    scaled = sums * scale[[0, 0, 2, 2, 2, 2, 2]] * tokens[:, None]
    want = {
        0: scaled,
        1: scaled.relu(),
        2: torch.nn.functional.gelu(scaled, approximate="tanh"),
        4: scaled * torch.sigmoid(1.702 * scaled),
        5: torch.nn.functional.silu(scaled),
    }[number]
    torch.testing.assert_close(y.float(), want, rtol=4e-3, atol=1e-5)


def test_quant_gmm_refuses():
    x, weight, scale = integers()
    half = {"group_list": ENDS, "output_dtype": torch.half}
    for kwargs, message in (
        ({"group_list": ENDS}, "output_dtype: got None"),
        ({**half, "act_type": 3}, "act_type: got 3"),
        ({**half, "act_type": 1}, "act_type: got 1, need 0 without per_token_scale"),
        ({**half, "offset": scale}, "offset: got a tensor"),
    ):
        with pytest.raises(ValueError, match=f"npu_quant_gmm: {message}"):
            npu_quant_gmm(x, weight, scale, **kwargs)


def test_weight_quant_gmm():
    _, weight, scale = integers()
    x = torch.randn(7, 8).half()
    scale, shift = scale.half(), torch.ones(3, 6).half()
    y = npu_weight_quant_gmm(x, weight, scale, antiquant_offset=shift, group_list=ENDS)
    again = npu_weight_quant_gmm_v2(x, weight, scale, antiquant_offset=shift, group_list=SIZES)
    assert torch.equal(y, again)
    matrices = ((weight.float() + 1) * scale.float()[:, None]).half()
    want = torch.cat([x[:2] @ matrices[0], x[2:] @ matrices[2]])
    torch.testing.assert_close(y, want)
    with pytest.raises(ValueError, match="act_type: got 1, need one of 0"):
        npu_weight_quant_gmm(x, weight, scale, group_list=ENDS, act_type=1)
