"""Wrong calls of torch_npu in our backends: the emulation must catch each of them."""

import pytest
import torch

from ms_ops import testing
from ms_ops.testing.npu import emulated_npu
from support.mutation import Mutation, assert_caught

MUTANTS = {
    "rms_norm": [
        ("eps by its short name", "ms_ops.norm.npu:forward", "epsilon=eps", "eps=eps", 2),
        ("dy and x swapped", "ms_ops.norm.npu:backward",
         "(dy.contiguous(), x.contiguous()", "(x.contiguous(), dy.contiguous()", 1),
        ("weight gradient left in fp32", "ms_ops.norm.npu:backward",
         "dweight.to(weight.dtype)", "dweight", 1),
        ("offset dropped", "ms_ops.norm.npu:_scale", "+ offset", "", 1),
    ],
    "swiglu": [
        ("gradient and input swapped", "ms_ops.activation.npu:backward",
         "(dy.contiguous(), x.contiguous()", "(x.contiguous(), dy.contiguous()", 1),
        ("dimension not passed on", "ms_ops.activation.npu:forward", ", dim=dim", "", 1),
        ("strided input", "ms_ops.activation.npu:forward", "x.contiguous()", "x", 1),
    ],
    "rope": [
        ("mode misspelt", "ms_ops.rope.npu:forward", '"interleave"', '"interleaved"', 1),
        ("modes exchanged", "ms_ops.rope.npu:backward", "if interleaved", "if not interleaved", 1),
        ("cos and sin swapped", "ms_ops.rope.npu:backward", "cos4, sin4, r", "sin4, cos4, r", 1),
        ("rotated in low precision", "ms_ops.rope.npu:_arrange",
         "torch.promote_types(x.dtype, cos.dtype)", "x.dtype", 1),
        ("other channels dropped", "ms_ops.rope.npu:_restore", "== x.shape[-1]", "<= 9999", 1),
    ],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_npu():
        yield


def small_samples(op, dtype):
    for sample in testing.OPERATORS[op].samples(dtype, "cpu"):
        small = sum(a.numel() for a in sample.args if isinstance(a, torch.Tensor)) < 4000
        if small and testing.declines(op, sample, "npu") is None:
            yield sample


CASES = [(op, Mutation(*parts)) for op, rows in MUTANTS.items() for parts in rows]


@pytest.mark.parametrize(("op", "mutation"), CASES, ids=[f"{op}-{m.name}" for op, m in CASES])
def test_mutant_is_caught(op, mutation):
    def check():
        for sample in small_samples(op, torch.bfloat16):
            testing.check_values(op, sample, "npu")
            testing.check_fake(op, sample, "npu")

    assert_caught(mutation, check, by=(AssertionError, RuntimeError, TypeError))
