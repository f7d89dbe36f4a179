"""dropout_add_norm: the mask as part of the contract, random numbers, what backward keeps."""

import pytest
import torch

import ms_ops
from ms_ops import testing

SHAPE = (2, 3, 10)


def operands():
    generator = torch.Generator().manual_seed(9)
    shapes = (SHAPE, SHAPE, SHAPE[-1:], SHAPE[-1:], SHAPE[:-1], SHAPE[-1:])
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


def written_out(mask, p, eps, norm, x, residual, weight, bias, row_scale, layer_scale):
    """(out, pre) with torch's own norms and a mask that is given."""
    kept = x * row_scale[..., None] * layer_scale * mask * (0.0 if p == 1 else 1 / (1 - p))
    pre = kept + residual
    if norm == "rms":
        return torch.nn.functional.rms_norm(pre, weight.shape, weight, eps), pre
    return torch.nn.functional.layer_norm(pre, weight.shape, weight, bias, eps), pre


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_torch_agrees_once_it_has_the_mask(norm, p):
    inputs = operands()
    x, residual, weight, bias, rows, layer = inputs
    inputs = [t for t in inputs if norm == "layer" or t is not bias]
    got = ms_ops.dropout_add_norm(
        *(x, residual, weight, bias if norm == "layer" else None),
        p=p,
        eps=1e-5,
        norm=norm,
        row_scale=rows,
        layer_scale=layer,
        prenorm=True,
        return_mask=True,
    )
    out, pre, mask = got
    assert mask.dtype is torch.bool
    assert mask.shape == x.shape
    want = written_out(mask, p, 1e-5, norm, x, residual, weight, bias, rows, layer)
    torch.testing.assert_close((out, pre), want)
    noise = [torch.randn_like(out) for _ in range(2)]
    gradients = torch.autograd.grad((out, pre), inputs, noise)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, inputs, noise))


def drawn(p, rng=None, shape=(64, 70), **options):
    x, weight = torch.ones(shape), torch.ones(shape[-1])
    given = {"eps": 1e-5, "return_mask": True, "dropout_rng": rng, **options}
    return ms_ops.dropout_add_norm(x, None, weight, p=p, **given)[1]


def test_the_mask_is_a_function_of_place_and_seed():
    rng = torch.tensor([2**40 + 7, 2])
    mask = drawn(0.3, rng)
    assert torch.equal(mask, drawn(0.3, rng))
    assert torch.equal(mask[:5, :33], drawn(0.3, rng, (5, 33)))
    for other in ([2**40 + 8, 2], [7, 2], [2**40 + 7, 3]):
        assert not torch.equal(mask, drawn(0.3, torch.tensor(other)))
    assert (drawn(0.2, rng) | ~mask).all()


def test_ranks_with_other_rows_need_offsets_of_their_own():
    # Four ranks that hold a quarter of the rows each, as in sequence parallelism.
    rng, shape, p = torch.tensor([11, 5]), (64, 70), 0.5
    same = [drawn(p, rng, shape) for _ in range(4)]
    assert all(torch.equal(same[0], mask) for mask in same[1:])
    own = [drawn(p, rng + torch.tensor([0, rank]), shape) for rank in range(4)]
    for i, first in enumerate(own):
        for second in own[i + 1 :]:
            # Independent masks agree in half of the places, give or take.
            agree = (first == second).double().mean().item()
            assert abs(agree - 0.5) <= 5 * 0.5 / (64 * 70) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_as_much_is_dropped_as_asked(p):
    kept = drawn(p, torch.tensor([1, 1]), (100, 100)).double().mean().item()
    assert abs(kept - (1 - p)) <= 5 * (p * (1 - p)) ** 0.5 / 100


def test_random_numbers_come_from_torch():
    torch.manual_seed(3)
    first, second = drawn(0.5), drawn(0.5)
    torch.manual_seed(3)
    assert torch.equal(first, drawn(0.5))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert drawn(0.5, training=False).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropped_infinities_leave_nothing():
    x, weight = torch.full((3, 8), torch.inf), torch.ones(8)
    out, pre = ms_ops.dropout_add_norm(x, None, weight, p=1.0, eps=1e-5, prenorm=True)
    assert not out.any()
    assert not pre.any()


@pytest.mark.parametrize(("asked", "dtypes"), [
    ({"residual_in_fp32": True}, (None, torch.float32)),
    ({}, (None, torch.bfloat16)),
    ({}, (torch.float32, torch.float32)),
    ({"residual_in_fp32": True}, (torch.bfloat16, torch.bfloat16)),
])  # fmt: skip
def test_dtype_of_the_stream(asked, dtypes):
    x, weight = torch.randn(3, 8).bfloat16(), torch.ones(8).bfloat16()
    residual = None if dtypes[0] is None else x.to(dtypes[0])
    out, pre = ms_ops.dropout_add_norm(x, residual, weight, p=0.0, eps=0.0, prenorm=True, **asked)
    assert (out.dtype, pre.dtype) == (torch.bfloat16, dtypes[1])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_backward_keeps_the_inputs_the_mask_and_two_numbers_a_row(p):
    x, residual = (torch.randn(6, 32).bfloat16().requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(32).bfloat16() for _ in range(2))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rng = torch.tensor([1, 2])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ms_ops.dropout_add_norm(x, residual, weight, bias, p=p, eps=0.1, dropout_rng=rng)
    assert out.requires_grad
    mask = 6 * 32 if p else 0
    assert sum(kept.values()) == 2 * 6 * 32 * 2 + 2 * 32 * 2 + 2 * 6 * 4 + mask


def test_compiled_dropout_is_eager_dropout():
    testing.check_compiled(
        "dropout_add_norm",
        [testing.find_sample("dropout_add_norm", "whole", torch.float32)],
        "portable",
    )
