"""A context-parallel attention on fake NPU tensors: its calls against the torch_npu wheel."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ms_parallel.context import AttnMask, SeqLayout, plan_attention, simulate_attention
from support import npu_contract, npu_stubs
from support.mutation import Mutation

HEADS, CHANNELS = (4, 2), 16
DOCUMENTS = (0, 24, 40, 96)
PLANS = {
    "ring": (AttnMask.causal(), {}),
    "documents": (AttnMask.causal(DOCUMENTS), {}),
    "window": (AttnMask(left=20, right=0), {}),
    "ulysses": (AttnMask.causal(), {"algorithm": "ulysses"}),
    "gathered": (AttnMask.causal(), {"algorithm": "allgather_kv"}),
}


@pytest.fixture(scope="module", autouse=True)
def _torch_npu(tmp_path_factory):
    npu_stubs.import_torch_npu(tmp_path_factory.mktemp("stubs"))


def run(name):
    """Run forward and backward of all ranks; return torch_npu's operators used."""
    mask, options = PLANS[name]
    layout = SeqLayout.zigzag(96, 2)
    plan = plan_attention(layout, mask, heads=HEADS, head_dims=(CHANNELS, CHANNELS), **options)
    contract = npu_contract.ContractMode()
    with FakeTensorMode():
        q, k, v = (
            [
                torch.empty(1, layout.length(rank), n, CHANNELS, dtype=torch.bfloat16, device="npu")
                for rank in range(2)
            ]
            for n in (HEADS[0], HEADS[1], HEADS[1])
        )
        leaves = [t.requires_grad_() for t in (*q, *k, *v)]
        with contract:
            outs = simulate_attention(q, k, v, plan)
            grads = torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])
    assert [(g.shape, g.dtype, g.device.type) for g in grads] == [
        (t.shape, t.dtype, "npu") for t in leaves
    ]
    return set(contract.called)


@pytest.mark.parametrize("name", PLANS)
def test_calls_are_accepted(name):
    def check():
        called = run(name)
        assert {"npu::npu_fusion_attention", "npu::npu_fusion_attention_grad"} <= called
        if name not in ("ulysses", "gathered"):  # one step there, nothing to merge
            assert "npu::npu_ring_attention_update" in called

    failure = npu_contract.in_child(check)
    assert not failure, failure


def test_a_wrong_call_is_noticed():
    keyword = Mutation("keyword", "ms_ops.attention.npu:backward", "scale_value=", "scale=")
    with keyword.applied():
        assert npu_contract.in_child(lambda: run("ring"))
