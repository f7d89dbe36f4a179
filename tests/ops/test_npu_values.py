"""Every NPU backend on the emulated torch_npu: the shared test body, mutants, what is refused."""

import pytest
import torch

import ms_ops
from ms_ops import registry, testing
from ms_ops.testing.npu import Readings, emulated_npu
from support.mutation import Mutation, assert_caught

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = [op for op in testing.OPERATORS if "npu" in registry.backends(op)]
# Kernels of 8-bit weights have no fp32 form, weights in training no other.
NOT_IN = {
    "ffn": {torch.float32},
    "fused_adamw_": {torch.bfloat16, torch.float16},
    "fused_ema_adamw_": {torch.bfloat16, torch.float16},
    "quant_grouped_matmul": {torch.float32},
    "weight_quant_grouped_matmul": {torch.float32},
}


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_npu():
        yield


def served(op, dtype):
    for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
        if testing.declines(op, sample, "npu") is None:
            yield sample


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPERATORS)
def test_values_fakes_and_repetition(op, dtype):
    count = 0
    for sample in served(op, dtype):
        testing.check_values(op, sample, "npu")
        testing.check_fake(op, sample, "npu")
        testing.check_deterministic(op, sample, "npu")
        count += 1
    assert (count >= 3) != (dtype in NOT_IN.get(op, ()))


@pytest.mark.parametrize("op", OPERATORS)
def test_errors(op):
    testing.check_errors(op, "npu")


def test_compiled_with_dynamic_shapes():
    op = "rms_norm"
    samples = [
        testing.find_sample(op, name, torch.float32) for name in testing.OPERATORS[op].resized
    ]
    testing.check_compiled(op, samples, "npu")


def test_a_call_without_a_wish_runs_on_the_npu_backend():
    x = torch.randn(3, 8)
    assert ms_ops.explain("swiglu", x).startswith("npu (priority 10): can serve")
    assert "npu (priority 10): torch_npu has no kernel" in ms_ops.explain("swiglu", x.double())


def test_accumulation_without_atb_turns_the_right_operand(monkeypatch):
    monkeypatch.delenv("ATB_HOME_PATH")
    sample = testing.find_sample("matmul_add_", "plain", torch.bfloat16)
    mutation = Mutation("operands", "ms_ops.matmul.npu:add", "acc, dy.t(), x", "acc, x.t(), dy")
    assert_caught(
        mutation, lambda: testing.check_values("matmul_add_", sample, "npu"), RuntimeError
    )


def test_readings_and_emulation_do_not_nest():
    with pytest.raises(RuntimeError, match="already on"), emulated_npu(Readings()):
        pass
