"""Every backend against the fp64 reference: outputs, all gradients, fakes, determinism, errors."""

import pytest
import torch

import ms_ops
from ms_ops import testing
from ms_ops.testing.cases import comm

BACKENDS = ("portable", "reference")


def cases(dtypes):
    for op, test in testing.OPERATORS.items():
        for dtype in dtypes:
            for sample in test.samples(dtype, "cpu"):
                short = str(dtype).removeprefix("torch.")
                yield pytest.param(op, dtype, sample.name, id=f"{op}-{short}-{sample.name}")


def small():
    for case in cases([torch.float64]):
        op, dtype, name = case.values
        if testing.is_small(testing.find_sample(op, name, dtype)):
            yield case


@pytest.mark.parametrize(("op", "dtype", "name"), list(cases(testing.DTYPES)))
def test_values_fakes_and_repetition(op, dtype, name):
    sample = testing.find_sample(op, name, dtype)
    testing.check_values(op, sample, *BACKENDS)
    testing.check_fake(op, sample, *BACKENDS)
    for backend in BACKENDS:
        testing.check_deterministic(op, sample, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "dtype", "name"), list(small()))
def test_finite_differences(op, dtype, name, backend):
    """Each entry of a gradient is compared with autograd's above, which these prove right."""
    sample = testing.find_sample(op, name, dtype)
    every_axis = backend == "reference" and testing.is_small(sample, 200)
    testing.check_gradients(op, sample, backend, fast=not every_axis)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", testing.OPERATORS)
def test_errors(op, backend):
    testing.check_errors(op, backend)


def test_every_operator_is_tested():
    assert {*testing.OPERATORS, *comm.OPERATORS} == set(ms_ops.operators())


@pytest.mark.parametrize("op", testing.OPERATORS)
def test_samples_live_where_they_are_asked_to(op):
    for sample in testing.OPERATORS[op].samples(torch.float32, "meta"):
        values = (*sample.args, *sample.kwargs.values())
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        assert {t.device.type for t in tensors} == {"meta"}, sample.name


def test_unwritten_places_show():
    with testing.poisoned_empty():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_second_derivative_is_refused():
    x = torch.randn(4, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(ms_ops.swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_the_reference_passes_as_a_third_party_backend():
    op = "swiglu"
    kernel = ms_ops.registry.kernel(op, "reference")
    ms_ops.register_backend(op, ms_ops.Backend("guest", 500, {op: kernel}))
    try:
        assert testing.check_backend(op, "guest", dtypes=[torch.float32]) > 10
    finally:
        ms_ops.unregister_backend(op, "guest")
