"""Feed-forward layers against the formula in fp64, values, gradients and errors."""

import pytest
import torch

import ms_ops
from support.mutation import Mutation, assert_caught

ENDS = torch.tensor([2, 2, 7])


def sigmoid_unit(z, slope=1.0):
    return z * torch.sigmoid(slope * z)


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / 2**0.5))


ACTIVATIONS = {
    "gelu": gelu,
    "fastgelu": lambda z: sigmoid_unit(z, 1.702),
    "relu": lambda z: z.clamp(min=0),
    "silu": sigmoid_unit,
}
GATED = {"geglu": gelu, "reglu": ACTIVATIONS["relu"], "swiglu": sigmoid_unit}


def operands(activation, experts, dtype):
    generator = torch.Generator().manual_seed(8)
    width = 6 if activation in GATED else 3
    lead = (3,) if experts else ()
    shapes = ((7, 5), (*lead, 5, width), (*lead, 3, 4), (*lead, width), (*lead, 4))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def expected(tensors, activation, experts):
    x, *weights = (t.detach().double().requires_grad_() for t in tensors)

    def layer(rows, weight1, weight2, bias1, bias2):
        hidden = rows @ weight1 + bias1
        if activation in GATED:
            first, second = hidden.chunk(2, -1)
            hidden = GATED[activation](first) * second
        else:
            hidden = ACTIVATIONS[activation](hidden)
        return hidden @ weight2 + bias2

    if not experts:
        return layer(x, *weights), [x, *weights]
    parts = [
        layer(x[a:b], *(w[e] for w in weights)) for e, (a, b) in enumerate(((0, 2), (2, 2), (2, 7)))
    ]
    return torch.cat(parts), [x, *weights]


def check(activation, experts, dtype):
    tensors = operands(activation, experts, dtype)
    x, weight1, weight2, bias1, bias2 = tensors
    groups = {"offsets": ENDS} if experts else {}
    y = ms_ops.ffn(x, weight1, weight2, activation, bias1=bias1, bias2=bias2, **groups)
    want, leaves = expected(tensors, activation, experts)
    rtol = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, tensors, dy)
    truths = torch.autograd.grad(want, leaves, dy.double())
    assert y.dtype is dtype
    for got, truth in zip((y, *grads), (want, *truths), strict=True):
        scale = truth.abs().max().item()
        torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True], ids=["whole", "experts"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
def test_values_and_gradients(activation, experts, dtype):
    check(activation, experts, dtype)


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation("slope", "ms_ops.matmul.ffn:fast_gelu", "1.702 * wide", "wide"),
        Mutation("bias dropped", "ms_ops.matmul.ffn:_product", "bias=bias", "bias=None"),
    ],
    ids=lambda m: m.name,
)
def test_a_wrong_layer_is_caught(mutation):
    assert_caught(
        mutation, lambda: check("fastgelu", True, torch.float32), (AssertionError, RuntimeError)
    )


def test_more_dimensions_and_other_biases():
    x, weight1, weight2, *_ = (t.detach() for t in operands("silu", False, torch.bfloat16))
    flat = ms_ops.ffn(x, weight1, weight2, "silu")
    assert torch.equal(ms_ops.ffn(x.view(7, 1, 5), weight1, weight2, "silu"), flat.view(7, 1, 4))
    wide = ms_ops.ffn(x, weight1, weight2, "silu", bias2=torch.ones(4))
    torch.testing.assert_close(wide, flat + 1, rtol=1e-2, atol=1e-2)
    empty = ms_ops.ffn(x[:0], weight1, weight2, "silu")
    assert empty.shape == (0, 4)


def test_errors():
    x, weight1, weight2, bias1, _ = operands("silu", False, torch.float32)
    experts = operands("silu", True, torch.float32)
    cases = [
        ((x, weight1, weight2, "tanh"), {}, ValueError, "activation: got 'tanh'"),
        ((x, weight1, weight2, "swiglu"), {}, ValueError, "weight1: got 3 columns, need an even"),
        ((x, weight2, weight1, "silu"), {}, ValueError, "weight1: got 3 rows, need 5"),
        ((x, weight1, weight1, "silu"), {}, ValueError, "weight2: got 5 rows, need 3"),
        ((x[0], weight1, weight2, "silu"), {}, ValueError, "x: got 1 dimensions"),
        ((x, weight1.half(), weight2, "silu"), {}, TypeError, "weight1: got torch.float16"),
        ((x, weight1, weight2, "silu"), {"bias1": bias1[1:]}, ValueError, r"bias1: got \(2,\)"),
        (
            (x, weight1, weight2, "silu"),
            {"offsets": ENDS},
            ValueError,
            "need offsets or group_sizes",
        ),
        ((*experts[:3], "silu"), {}, ValueError, "weight1: got 3 dimensions"),
    ]
    for args, kwargs, kind, message in cases:
        with pytest.raises(kind, match=f"ffn: .*{message}" if ":" not in message else message):
            ms_ops.ffn(*args, **kwargs)
