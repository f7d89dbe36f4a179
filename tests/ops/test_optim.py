"""Many steps of AdamW beside torch's optimizer, and what the calls of one step do not show."""

import pytest
import torch

import ms_ops

SHAPES = ((4, 3), (5,), (2, 0), ())
BACKENDS = ("portable", "reference")
RATES = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
FORMS = {
    "decoupled": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "amsgrad": True},
    "penalty": {"mode": 0},
}


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def zeros(like):
    return [torch.zeros_like(t) for t in like]


def torchs_optimizer(params, mode=1, **options):
    kind = torch.optim.AdamW if mode else torch.optim.Adam
    rates = {"lr": RATES["lr"], "eps": RATES["eps"], "weight_decay": RATES["weight_decay"]}
    betas = (RATES["beta1"], RATES["beta2"])
    return kind(params, betas=betas, foreach=False, **rates, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_follow_torchs_optimizer(form, backend):
    options = dict(FORMS[form])
    mine, theirs = tensors(0), [t.requires_grad_() for t in tensors(0)]
    optimizer = torchs_optimizer(theirs, **options)
    m, v, step = zeros(mine), zeros(mine), torch.zeros(1, dtype=torch.int64)
    largest = zeros(mine) if options.pop("amsgrad", False) else None
    with ms_ops.backend(backend):
        for number in range(20):
            # Gradients that shrink: the largest second moment is not the newest.
            grads = [g / (1 + number) for g in tensors(100 + number)]
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g
            optimizer.step()
            step += 1
            ms_ops.fused_adamw_(mine, grads, m, v, step, largest, **RATES, **options)
            for p, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(p, other.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_follow_torchs_average(backend):
    mine, theirs = tensors(0), torch.nn.ParameterList(tensors(0))
    optimizer = torchs_optimizer(theirs)
    average = torch.optim.swa_utils.AveragedModel(
        theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    average.update_parameters(theirs)  # The first update copies.
    m, v, emas, step = zeros(mine), zeros(mine), tensors(0), torch.zeros(1, dtype=torch.int64)
    with ms_ops.backend(backend):
        for number in range(20):
            grads = tensors(200 + number)
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g
            optimizer.step()
            average.update_parameters(theirs)
            step += 1
            ms_ops.fused_ema_adamw_(mine, grads, m, v, emas, step, ema_decay=0.9, **RATES)
            for ema, other in zip(emas, average.module, strict=True):
                torch.testing.assert_close(ema, other.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("correct", [True, False])
def test_fp32_steps_stay_near_fp64(backend, correct):
    state = [tensors(0), zeros(tensors(0)), zeros(tensors(0))]
    options = {**RATES, "bias_correction": correct}
    with ms_ops.backend(backend):
        for number in range(1, 21):
            grads, step = tensors(number), torch.tensor([number])
            low = [[t.float() for t in part] for part in state]
            ms_ops.fused_adamw_(low[0], [g.float() for g in grads], *low[1:], step, **options)
            ms_ops.fused_adamw_(state[0], grads, *state[1:], step, **options)
            for p, wide in zip(low[0], state[0], strict=True):
                torch.testing.assert_close(p.double(), wide, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("correct", [True, False])
def test_a_list_is_its_tensors_one_by_one_bit_for_bit(backend, correct):
    step = torch.tensor([4])
    options = {**RATES, "bias_correction": correct}

    def state():
        parts = [tensors(seed, torch.float32) for seed in range(5)]
        parts[3] = [t.square() for t in parts[3]]
        return parts

    together, single = state(), state()
    with ms_ops.backend(backend):
        given = ms_ops.fused_ema_adamw_(*together, step, **options)
        for one in zip(*single, strict=True):
            ms_ops.fused_ema_adamw_(*one, step, **options)
    for part, other in zip(together, single, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))
    assert given[0] is together[0]
    assert given[3] is together[4]
    assert step.item() == 4


def test_weights_that_require_gradients():
    p = torch.nn.Parameter(torch.ones(3))
    version = p._version
    ms_ops.fused_adamw_(p, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.tensor(1.0))
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 1e-3))
    assert p._version > version
    assert p.requires_grad


def test_strides_are_those_of_the_caller():
    wide = torch.ones(4, 6)
    parts = [torch.zeros(4, 3) for _ in range(3)]
    ms_ops.fused_adamw_(wide[:, ::2], torch.ones(4, 3), *parts[:2], torch.tensor([1]), lr=0.5)
    torch.testing.assert_close(wide[:, ::2], torch.full((4, 3), 0.5))
    assert torch.equal(wide[:, 1::2], torch.ones(4, 3))
