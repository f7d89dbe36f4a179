"""Which lines of the NPU backends ran on fake tensors of the real torch_npu: all but these."""

import json

import pytest

from support import npu_contract
from support.npu_backends import never_run

# Verdicts on calls that reach no kernel, forms of no shared sample, and names of a real HCCL group;
# tests/ops/test_npu_coverage.py runs them on the emulation.
ELSEWHERE = {
    "npu.py": ['return f"tensors on {facts.device}, need npu"'],
    "attention/npu.py": ['return "no ALiBi for packed sequences"'],
    "fused_comm/npu.py": [
        "backend = group._get_backend(device)",
        "_names[group] = backend.get_hccl_comm_name(torch.distributed.get_rank())",
        'return "a group of one rank: nothing is sent"',
        'return f"torch_npu\'s kernels serve 2, 4 or 8 ranks, not {present}"',
    ],
    "matmul/npu.py": [
        "portable.add(acc, x, dy)",
        "return portable.forward(x, weight, offsets, bias, transposed)",
        'return "no fp32 bias beside fp16"',
    ],
    "matmul/npu_quant.py": [
        "args = (per_token_scale, bias, activation, output_dtype)",
        "return portable.quant(x, weight, scale, offsets, *args)",
        'return "no fp64 scale"',
        'return "no fp32 bias beside fp16"',
    ],
    "rope/npu.py": [
        "cos, sin = (t.expand(*x.shape[:-1], width) for t in (cos, sin))",
        'kinds, sizes = "v", [x.shape[:-1].numel()]',
    ],
}


def test_every_line_ran_on_the_wheel():
    """Runs after the contract tests; with a part of them it has nothing to say."""
    noted = len(list(npu_contract.lines_folder.glob("*.json")))
    if noted < 50:
        pytest.skip(f"{noted} of the contract tests ran, this needs all of them")
    missing = never_run(npu_contract.lines_folder)
    assert missing == ELSEWHERE, json.dumps(missing, indent=1)
