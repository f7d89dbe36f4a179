"""Every line of the NPU backends runs on the emulated torch_npu, and every recorded operator."""

import pytest
import torch

import ms_ops
from ms_ops import npu, registry, testing
from ms_ops.matmul import portable
from ms_ops.testing.npu import emulated_npu, recorded_schemas
from ms_ops.testing.npu.matmul import TORCHS
from support.comm_ranks import run_on_emulation
from support.lines import function_lines, lines_run
from support.npu_backends import backend_files
from support.npu_contract import forward_and_backward
from support.npu_samples import all_samples

# Only reached under a tracer, which sys.settrace does not follow: tests/ops/test_npu_attention.py.
TRACED = {"npu.npu_fusion_attention_v3", "npu.npu_fusion_attention_grad_v3"}


def every_call(dtype):
    for op, test in testing.OPERATORS.items():
        if "npu" not in registry.backends(op):
            continue
        extra = all_samples(dtype) if op == "attention" else []
        for sample in (*test.samples(dtype, "cpu"), *extra):
            if testing.declines(op, sample, "npu") is None:
                yield op, test, sample


def check_odd_calls():
    """What the shared samples do not reach."""
    x, cos = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)
    with ms_ops.backend(rope="portable"):
        turned = ms_ops.rope(x, cos, cos)
    torch.testing.assert_close(ms_ops.rope(x, cos, cos), turned)
    bias = torch.randn(2, 3)
    y = ms_ops.grouped_matmul(torch.randn(4, 0), torch.randn(2, 0, 3), [1, 4], bias=bias)
    assert torch.equal(y, bias[[0, 1, 1, 1]])
    x, weight = torch.ones(2, 1).char(), torch.ones(1, 1, 65536).char()
    args = (x, weight, torch.ones(1, 65536), torch.tensor([2]))
    with ms_ops.backend("npu"):
        assert (ms_ops.quant_grouped_matmul(*args, output_dtype=torch.float16) == 1).all()


def check_accumulation_without_atb(monkeypatch):
    """torch's product into fp32, then the product of copies."""
    monkeypatch.delenv("ATB_HOME_PATH")
    for wide in (True, False):
        monkeypatch.setattr(portable, "wide_product", wide)
        for name in ("plain", "transposed"):
            sample = testing.find_sample("matmul_add_", name, torch.bfloat16)
            testing.check_values("matmul_add_", sample, "npu")


def check_refusals():
    """Why a backend passes a call on."""
    find = testing.find_sample
    wide_bias = find("grouped_matmul", "wide_bias", torch.float16)
    assert "no fp32 bias" in testing.declines("grouped_matmul", wide_bias, "npu")
    wide_bias = find("weight_quant_grouped_matmul", "wide_bias", torch.float16)
    assert "no fp32 bias" in testing.declines("weight_quant_grouped_matmul", wide_bias, "npu")
    whole = find("quant_grouped_matmul", "scaled", torch.float16)
    scales = {**whole.kwargs, "per_token_scale": torch.ones(7).double()}
    whole = testing.Sample("fp64", whole.args, scales, ())
    assert "fp64" in testing.declines("quant_grouped_matmul", whole, "npu")
    wide_bias = find("ffn", "wide_biases", torch.float16)
    assert "no fp32 bias" in testing.declines("ffn", wide_bias, "npu")
    on_device = ms_ops.Facts("cpu", torch.float16, (("groups_on", "npu"),))
    assert "from the host" in registry.kernel("ffn", "npu").supports(on_device)
    assert "float64" in testing.declines("swiglu", find("swiglu", "dim0", torch.float64), "npu")
    thd = find("attention", "thd", torch.float32)
    slopes = {**thd.kwargs, "alibi_slopes": ms_ops.alibi_slopes(4)}
    packed = testing.Sample("alibi", thd.args, slopes)
    assert "ALiBi" in testing.declines("attention", packed, "npu")
    assert "tensors on cpu" in npu.declines(ms_ops.Facts("cpu", torch.float32))
    assert npu.available() == "torch_npu is not loaded"


@pytest.fixture(scope="module")
def ran():
    """Run all samples, forward and backward; return the lines and operators that were reached."""
    files = backend_files()
    with emulated_npu() as calls, lines_run(files) as lines, ms_ops.backend("npu"):
        for dtype in (torch.float32, torch.bfloat16):
            for _, test, sample in every_call(dtype):
                args, kwargs = list(sample.args), dict(sample.kwargs)
                for place in test.mutates:
                    args[place] = None if args[place] is None else args[place].clone()
                leaves = []
                for place in sample.differentiable:
                    where = kwargs if isinstance(place, str) else args
                    where[place] = where[place].detach().requires_grad_()
                    leaves.append(where[place])
                forward_and_backward(test.function, args, kwargs, leaves)
        check_odd_calls()
        run_on_emulation()
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_accumulation_without_atb(monkeypatch)
        check_refusals()
    return lines, {call.name for call in calls}


def test_every_operator_of_the_record_is_called(ran):
    known = {*recorded_schemas(), *TORCHS}
    missing = {name.replace("::", ".") for name in known - ran[1]}
    assert missing == TRACED


def test_every_line_ran(ran):
    missing = {
        file.rpartition("ms_ops/")[2]: sorted(function_lines(file) - lines)
        for file, lines in ran[0].items()
    }
    assert {file: lines for file, lines in missing.items() if lines} == {}
    assert len(missing) >= 7
