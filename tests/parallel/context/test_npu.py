"""The executor's calls on the emulated kernels of torch_npu."""

from collections import Counter

import pytest
import torch

from ms_ops.testing.npu import emulated_npu
from ms_parallel.context import AttnMask, SeqLayout
from support.context import Case, error, make_plan

DOCUMENTS = (0, 5, 23, 40)
PLANS = (
    ({}, AttnMask.causal()),
    ({"pruned": True}, AttnMask.causal(DOCUMENTS)),
    ({"algorithm": "usp", "ulysses": 2}, AttnMask.causal()),
    ({"algorithm": "allgather_kv"}, AttnMask.causal(DOCUMENTS)),
    ({"algorithm": "ulysses", "kv_keep": "pre_k"}, AttnMask.window(6)),
    ({"algorithm": "tasks"}, AttnMask.from_matrix(torch.arange(1600).view(40, 40) % 3 != 1)),
)


@pytest.fixture(scope="module")
def calls():
    with emulated_npu() as found:
        yield found


@pytest.mark.parametrize(("options", "mask"), PLANS)
def test_values(calls, options, mask):
    plan = make_plan(SeqLayout.zigzag(40, 4), mask, (4, 2), (16, 16), grad_bytes=4, **options)
    case = Case(plan, batch=2, dtype=torch.float32)
    exact = case.whole()
    calls.clear()
    found = case.simulated()
    assert error(found, exact) < 2e-5
    names = Counter(call.name for call in calls)
    assert names["npu::npu_fusion_attention"] == names["npu::npu_fusion_attention_grad"] > 0


def test_positions(calls):
    """Blocks know where they lie: ALiBi of a kernel that counts from its first query."""
    plan = make_plan(SeqLayout.zigzag(40, 4), AttnMask.causal(), (4, 2), (16, 16), grad_bytes=4)
    slopes = torch.linspace(0.1, 0.4, 4)
    case = Case(plan, dtype=torch.float32, options={"alibi_slopes": slopes})
    calls.clear()
    assert error(case.simulated(), case.whole()) < 2e-5
    assert any(call.name == "npu::npu_fusion_attention_v2" for call in calls)
