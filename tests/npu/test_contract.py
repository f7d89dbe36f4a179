"""The NPU backends against the torch_npu wheel: its schemas, its shape functions, no hardware."""

import pytest
import torch

from ms_ops import registry, testing
from ms_ops.testing.npu import recorded_schemas
from support import npu_contract, npu_stubs
from support.mutation import Mutation

OPERATORS = [op for op in testing.OPERATORS if "npu" in registry.backends(op)]


@pytest.fixture(scope="module", autouse=True)
def _torch_npu(tmp_path_factory):
    npu_stubs.import_torch_npu(tmp_path_factory.mktemp("stubs"))


@pytest.mark.parametrize("name", recorded_schemas())
def test_schema_is_the_recorded_one(name):
    base, _, overload = name.partition(".")
    assert str(torch._C._get_schema(base, overload)) == recorded_schemas()[name]


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CALLS = [
    *((op, dtype) for op in OPERATORS for dtype in (torch.float32, torch.bfloat16)),
    # Forms that are in fp16 only.
    ("ffn", torch.float16),
    ("quant_grouped_matmul", torch.float16),
]


@pytest.mark.parametrize(("op", "dtype"), CALLS, ids=[f"{op}-{SHORT[t]}" for op, t in CALLS])
def test_calls_are_accepted_and_give_what_our_fakes_promise(op, dtype, monkeypatch):
    monkeypatch.setenv("ATB_HOME_PATH", "not here")

    def check():
        count, called = npu_contract.run_samples(op, dtype)
        # fp32 may be all torch's own; some operators have no 16-bit form.
        assert called or dtype is torch.float32 or not count, "no operator of torch_npu was called"

    failure = npu_contract.in_child(check)
    assert not failure, failure


def test_accumulation_without_atb(monkeypatch):
    monkeypatch.delenv("ATB_HOME_PATH", raising=False)

    def check():
        count, called = npu_contract.run_samples("matmul_add_", torch.bfloat16)
        # Two samples have no rows or columns, one adds to 16 bits.
        assert called == ["aten::addmm"] * (count - 3)

    failure = npu_contract.in_child(check)
    assert not failure, failure


def test_torchs_own_operators_that_have_npu_kernels():
    for name in ("_fused_adamw_", "_foreach_lerp_.Scalar", "addmm.dtype_out", "native_layer_norm"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "PrivateUse1"), name


MUTANTS = [
    Mutation("keyword", "ms_ops.norm.npu:forward", "epsilon=eps", "eps=eps", 2),
    Mutation("gradient's dtype", "ms_ops.norm.npu:backward", "dweight.to(weight.dtype)", "dweight"),
    Mutation("order", "ms_ops.norm.npu:backward", "scale, rstd)", "rstd, scale)"),
]


@pytest.mark.parametrize("mutation", MUTANTS, ids=[m.name for m in MUTANTS])
def test_a_wrong_call_is_noticed(mutation):
    with mutation.applied():
        assert npu_contract.in_child(lambda: npu_contract.run_samples("rms_norm", torch.bfloat16))
