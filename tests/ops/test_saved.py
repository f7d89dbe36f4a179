"""What each operator keeps for its backward, in bytes, and how autocast treats it."""

import pytest
import torch

import ms_ops

DTYPE = torch.bfloat16


def saved(run):
    """Return the bytes that autograd keeps while `run` builds its graph, each storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storages.values())


def make(*shape, dtype=DTYPE):
    return torch.randn(*shape).to(dtype).requires_grad_()


def test_rms_norm_keeps_its_inputs_and_one_number_a_row():
    x, weight = make(6, 4, 32), make(32)
    assert saved(lambda: ms_ops.rms_norm(x, weight)) == 6 * 4 * 32 * 2 + 32 * 2 + 6 * 4 * 4


def test_swiglu_keeps_its_input():
    x = make(6, 4, 32)
    assert saved(lambda: ms_ops.swiglu(x)) == 6 * 4 * 32 * 2


def test_swiglu_with_bias_or_weights_keeps_them_and_its_input():
    x, bias, weights = make(6, 4, 32), make(32), make(6, 4, 1)
    assert saved(lambda: ms_ops.bias_swiglu(x, bias)) == (6 * 4 * 32 + 32) * 2
    assert saved(lambda: ms_ops.weighted_swiglu(x, weights)) == (6 * 4 * 32 + 6 * 4) * 2


def test_rope_keeps_cos_and_sin():
    x, angles = make(6, 2, 4, 32), torch.randn(6, 1, 1, 32)
    cos, sin = angles.cos(), angles.sin()
    assert saved(lambda: ms_ops.rope(x, cos, sin)) == 2 * 6 * 32 * 4


def test_a_product_with_8_bit_weights_keeps_them_and_no_rows():
    x, weight = make(10, 8), torch.randint(-9, 9, (3, 8, 6), dtype=torch.int8)
    scale, ends = make(3, 6).detach(), torch.tensor([3, 3, 10])
    whole = 3 * 8 * 6 + 3 * 6 * 2 + 3 * 8
    assert saved(lambda: ms_ops.weight_quant_grouped_matmul(x, weight, scale, ends)) == whole


def test_attention_keeps_no_score_matrix():
    q, k, v = make(2, 50, 4, 8), make(2, 50, 2, 8), make(2, 50, 2, 8)
    whole = (2 * 50 * 4 * 8 * 2 + 2 * 2 * 50 * 2 * 8) * 2 + 2 * 4 * 50 * 4
    assert saved(lambda: ms_ops.attention(q, k, v, causal=True)) == whole


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rope"])
def test_autocast_leaves_the_dtype_of_elementwise_operators(op):
    x, weight = torch.randn(4, 8), torch.randn(8)
    calls = {
        "rms_norm": lambda: ms_ops.rms_norm(x, weight),
        "swiglu": lambda: ms_ops.swiglu(x),
        "rope": lambda: ms_ops.rope(x, x.cos(), x.sin()),
    }
    plain = calls[op]()
    with torch.autocast("cpu", torch.bfloat16):
        cast = calls[op]()
    assert cast.dtype is torch.float32
    assert torch.equal(plain, cast)


def test_autocast_casts_attention():
    q, k, v = (torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ms_ops.attention(q, k, v, return_lse=True)
    assert out.dtype is torch.bfloat16
    assert lse.dtype is torch.float32
    low = ms_ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, low)
    out.backward(torch.randn_like(out))
    assert q.grad.dtype is torch.float32


def test_autocast_under_compile():
    torch._dynamo.reset()
    q = torch.randn(2, 5, 4, 8)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ms_ops.attention(x, x, x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), run(q))
