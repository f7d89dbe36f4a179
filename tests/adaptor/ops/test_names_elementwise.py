"""The operator names of MindSpeed for norm, activation and rotation: signatures, values, errors."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mindspeed.ops.npu_rotary_position_embedding import npu_rotary_position_embedding
from mindspeed.ops.rms_norm import rms_norm
from mindspeed.ops.swiglu import swiglu

SIGNATURES = {
    npu_rotary_position_embedding: "(x, cos, sin, mode=0)",
    rms_norm: "(x, gamma, epsilon=1e-06)",
    swiglu: "(x, dim=-1)",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[function]


def with_gradients(function, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_swiglu():
    x = torch.randn(6, 5)
    ours = with_gradients(lambda x: swiglu(x, 0), x)
    theirs = with_gradients(lambda x: F.silu(x[:3]) * x[3:], x)
    torch.testing.assert_close(ours, theirs)


def test_rms_norm():
    x, gamma = torch.randn(3, 8), torch.randn(8)
    ours = with_gradients(lambda x, g: rms_norm(x, g, 1e-3), x, gamma)
    theirs = with_gradients(lambda x, g: F.rms_norm(x, (8,), g, 1e-3), x, gamma)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [0, 1])
def test_rotation_turns_pairs(mode):
    x, angle = torch.randn(3, 2, 5, 8), torch.randn(3, 1, 1, 4)
    full = torch.cat((angle, angle), -1) if mode == 0 else angle.repeat_interleave(2, -1)

    def turned(x):
        a, b = x.chunk(2, -1) if mode == 0 else (x[..., 0::2], x[..., 1::2])
        z = torch.view_as_real(torch.complex(a, b) * torch.exp(1j * angle))
        return torch.cat((z[..., 0], z[..., 1]), -1) if mode == 0 else z.flatten(-2)

    def ours(x):
        return npu_rotary_position_embedding(x, full.cos(), full.sin(), mode)

    torch.testing.assert_close(with_gradients(ours, x), with_gradients(turned, x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": 2}, "mode: got 2, need 0 or 1"),
        ({"x": torch.ones(3, 4)}, "x: got 2 dimensions, need 4"),
        ({"x": torch.ones(1, 1, 2, 8)}, "need 8 channels, as x has"),
        ({"cos": torch.ones(1, 1, 1, 4).requires_grad_()}, "gradients for both or neither"),
        ({"sin": torch.ones(1, 1, 2, 4)}, "cos's shape"),
    ],
)
def test_refusals(changed, message):
    fine = {name: torch.ones(1, 1, 1, 4) for name in ("x", "cos", "sin")}
    with pytest.raises(ValueError, match=message):
        npu_rotary_position_embedding(**{**fine, **changed})
