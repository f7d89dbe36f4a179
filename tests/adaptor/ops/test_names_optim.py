"""The operator names of MindSpeed for optimizers: signatures, values, errors."""

import inspect

import pytest
import torch

import ms_ops
from mindspeed.ops.npu_apply_fused_adamw_v2 import npu_apply_fused_adamw_v2
from mindspeed.ops.npu_apply_fused_ema_adamw import npu_apply_fused_ema_adamw

RATES = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.2}
SIGNATURES = {
    npu_apply_fused_adamw_v2: (
        "param grad exp_avg exp_avg_sq max_exp_avg_sq state_step lr=0.001 beta1=0.9 beta2=0.999 "
        "weight_decay=0.0 eps=1e-08 amsgrad=False maximize=False"
    ),
    npu_apply_fused_ema_adamw: (
        "grad var m v s step lr=0.001 ema_decay=0.9999 beta1=0.9 beta2=0.999 eps=1e-08 mode=1 "
        "bias_correction=True weight_decay=0.0"
    ),
}


def state():
    generator = torch.Generator().manual_seed(6)
    return [torch.rand(4, 3, generator=generator) for _ in range(5)]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
    ]
    assert " ".join(found) == SIGNATURES[function]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_v2(amsgrad, maximize):
    (p, g, m, v, largest), (p2, g2, m2, v2, largest2) = state(), state()
    step = torch.tensor(3.0)
    options = {**RATES, "amsgrad": amsgrad, "maximize": maximize}
    assert npu_apply_fused_adamw_v2(p, g, m, v, largest, step, **options) is None
    given = largest2 if amsgrad else None
    ms_ops.fused_adamw_(p2, g2, m2, v2, step, given, **RATES, maximize=maximize)
    want = [p2, g2, m2, v2, largest2]
    assert all(torch.equal(a, b) for a, b in zip((p, g, m, v, largest), want, strict=True))
    assert not torch.equal(p, state()[0])


def test_adamw_v2_needs_the_largest_moments_with_amsgrad():
    p, g, m, v, _ = state()
    with pytest.raises(TypeError, match="adamw_v2: max_exp_avg_sq: got NoneType, need a torch"):
        npu_apply_fused_adamw_v2(p, g, m, v, None, torch.tensor(1.0), amsgrad=True)


def test_ema_adamw():
    g, p, m, v, s = state()
    step = torch.tensor([3])
    found = npu_apply_fused_ema_adamw(g, p, m, v, s, step, 0.1, 0.7, 0.8, 0.9, 1e-3, 0, False, 0.2)
    assert all(a is b for a, b in zip(found, (p, m, v, s), strict=True))
    g2, p2, m2, v2, s2 = state()
    g2 = g2 + 0.2 * p2
    m2, v2 = 0.8 * m2 + 0.2 * g2, 0.9 * v2 + 0.1 * g2**2
    p2 = p2 - 0.1 * m2 / (v2.sqrt() + 1e-3)
    torch.testing.assert_close(found, (p2, m2, v2, 0.7 * s2 + 0.3 * p2))
