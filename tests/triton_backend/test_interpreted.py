"""The Triton backends in Triton's interpreter, on CPU tensors: the shared test body."""

import pytest
import torch

import ms_ops
from ms_ops import registry, selftest, testing, triton
from ms_ops.norm import triton as norm

OPERATORS = [op for op in testing.OPERATORS if "triton" in registry.backends(op)]
IDS = ["fp64", "fp32", "bf16", "fp16"]


def served(op, dtype):
    for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
        if testing.declines(op, sample, "triton") is None:
            yield sample


def test_the_families_are_there():
    families = {registry._families[op].rpartition(".")[2] for op in OPERATORS}
    assert families == {"norm", "activation", "rope", "merge", "moe"}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=IDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_and_gradients(op, dtype):
    samples = list(served(op, dtype))
    assert len(samples) == len(list(testing.OPERATORS[op].samples(dtype, "cpu")))
    for sample in samples:
        testing.check_values(op, sample, "triton")


@pytest.mark.parametrize("op", OPERATORS)
def test_fakes_repetition_and_errors(op):
    for sample in list(served(op, torch.float16))[:3]:
        testing.check_fake(op, sample, "triton")
        testing.check_deterministic(op, sample, "triton")
    testing.check_errors(op, "triton")


@pytest.mark.parametrize("op", OPERATORS)
def test_finite_differences(op):
    small = [s for s in served(op, torch.float64) if testing.is_small(s)]
    size = {s.name: sum(a.numel() for a in s.args if isinstance(a, torch.Tensor)) for s in small}
    least = min((s for s in small if size[s.name] > 4), key=lambda s: size[s.name])
    testing.check_gradients(op, least, "triton")


def test_traces_get_the_portable_functions():
    op = "rms_norm"
    names = testing.OPERATORS[op].resized
    samples = [testing.find_sample(op, name, torch.float32) for name in names]
    testing.check_custom_op(op, samples[0], "triton")
    testing.check_compiled(op, samples, "triton")


def test_the_interpreter_serves_who_names_it():
    x = torch.randn(3, 8)
    lines = ms_ops.explain("swiglu", x).splitlines()
    assert lines[-1] == f"triton (priority {triton.INTERPRETED_PRIORITY}): can serve"
    facts = ms_ops.Facts("cpu", x.dtype)
    assert registry.choose("swiglu", facts) == "portable"
    with ms_ops.backend("triton"):
        assert registry.choose("swiglu", facts) == "triton"


def test_rows_too_wide_for_a_program(monkeypatch):
    monkeypatch.setattr(triton, "WIDEST", 8)
    monkeypatch.setattr(norm._forward, "launch", None)
    sample = testing.find_sample("rms_norm", "shape(4, 16)", torch.float32)
    testing.check_values("rms_norm", sample, "triton")


def test_selftest(capsys):
    assert selftest.main(["--backend", "triton", "--op", "moe_permute"]) == 0
    assert '"device": "cpu"' in capsys.readouterr().out
