"""The operator names of MindSpeed for dropout, sum and norm: signatures, values, errors."""

import inspect

import pytest
import torch

import ms_ops
from mindspeed.ops.dropout_add_layer_norm import npu_dropout_add_layer_norm
from mindspeed.ops.dropout_add_rms_norm import npu_dropout_add_rms_norm

BOTH = {"layer": npu_dropout_add_layer_norm, "rms": npu_dropout_add_rms_norm}
NEEDED = ["x0", "residual", "weight", "bias", "dropout_p", "epsilon"]
DEFAULTS = {
    "rowscale": None,
    "layerscale": None,
    "prenorm": False,
    "residual_in_fp32": False,
    "return_dropout_mask": False,
}


def operands():
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 3, 8), (2, 3, 8), (8,), (8,), (2, 3), (8,))
    return [torch.randn(s, generator=generator) for s in shapes]


@pytest.mark.parametrize("function", BOTH.values(), ids=BOTH)
def test_signatures(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [*NEEDED, *DEFAULTS]
    assert [parameters[n].default for n in NEEDED] == [inspect.Parameter.empty] * 6
    assert {n: parameters[n].default for n in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("norm", BOTH)
def test_values(norm):
    x, residual, weight, bias, rows, layer = operands()
    function = BOTH[norm]
    torch.manual_seed(1)
    got = function(x, residual, weight, bias, 0.4, 1e-5, rows, layer, True, False, True)
    torch.manual_seed(1)
    want = ms_ops.dropout_add_norm(
        *(x, residual, weight, bias if norm == "layer" else None),
        p=0.4,
        eps=1e-5,
        norm=norm,
        row_scale=rows,
        layer_scale=layer,
        prenorm=True,
        return_mask=True,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.testing.assert_close(got[1], x * rows[..., None] * layer * got[2] / 0.6 + residual)


def test_torch_agrees_without_dropout():
    x, residual, weight, bias, *_ = operands()
    layer = npu_dropout_add_layer_norm(x, residual, weight, bias, 0.0, 1e-5)
    rms = npu_dropout_add_rms_norm(x, residual, weight, bias, 0.0, 1e-5)
    norms = torch.nn.functional
    torch.testing.assert_close(layer, norms.layer_norm(x + residual, (8,), weight, bias, 1e-5))
    torch.testing.assert_close(rms, norms.rms_norm(x + residual, (8,), weight, 1e-5))


@pytest.mark.parametrize("norm", BOTH)
def test_what_is_returned(norm):
    x, _, weight, bias, *_ = operands()
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    call = BOTH[norm]
    out = call(x, None, weight, bias, 0.0, 1e-5)
    both = call(x, None, weight, bias, 0.0, 1e-5, prenorm=True, residual_in_fp32=True)
    assert torch.equal(both[0], out)
    assert torch.equal(both[1], x.float())
    _, mask = call(x, None, weight, bias, 0.0, 1e-5, return_dropout_mask=True)
    assert mask.dtype is torch.bool
    assert mask.all()
    with pytest.raises(ValueError, match="p: got 2, need 0 to 1"):
        call(x, None, weight, bias, 2, 1e-5)
