"""Attention's NPU backend beyond the shared samples: which kernel and which mask it asks for."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import ms_ops
from ms_ops import testing
from ms_ops.testing.npu import Readings, emulated_npu
from support.npu_samples import sample


def asked(calls):
    """Version, sparse mode and type of the position term of torch_npu's operators called."""
    return [
        (
            call.name.removeprefix("npu::npu_fusion_attention"),
            call.given.get("sparse_mode", 0),
            call.given.get("pse_type", 1),
        )
        for call in calls
    ]


# Version, sparse mode and type of the position term of the forward call; None: not the kernel's.
EXPECTED = {
    "causal": ("", 3, 1),
    "upper_left": ("", 2, 1),
    "lower_right": ("", 3, 1),
    "band": ("", 4, 1),
    "upper_band": ("", 1, 1),
    "prefix": ("", 6, 1),
    "alibi": ("_v2", 3, 2),
    "alibi_behind": ("_v2", 0, 2),
    "alibi_sqrt": ("_v2", 0, 3),
    "unscaled_bias": ("_v2", 0, 0),
    "scaled_bias": ("", 0, 1),
    "head_mask": ("", 1, 1),
    "pack_without_keys": None,
    "pack_window": ("", 4, 1),
    "pack_prefix": ("", 6, 1),
    "pack_sink": ("", 3, 1),
    "pack_spare": ("", 3, 1),
}


def both_ways(call):
    return [] if call is None else [call, (f"_grad{call[0]}", *call[1:])]


@pytest.mark.parametrize("name", EXPECTED)
def test_kernel_and_mask(name):
    with emulated_npu() as calls:
        one = sample(name)
        with ms_ops.backend(attention="npu"):
            tensors = [t.detach().requires_grad_() for t in one.args]
            out, _ = ms_ops.attention(*tensors, **one.kwargs)
            out.backward(torch.randn_like(out))
        assert asked(calls) == both_ways(EXPECTED[name])
        for dtype in (torch.float32, torch.bfloat16):
            testing.check_values("attention", sample(name, dtype), "npu")
            testing.check_fake("attention", sample(name, dtype), "npu")


def test_what_is_too_large_for_the_kernel_is_written_out():
    starts = torch.arange(1002, dtype=torch.int32)
    calls = [
        (torch.randn(1001, 1, 4), {"layout": "thd", "cu_seqlens_q": starts}),
        (torch.randn(1, 3, 2, 770), {}),
        (torch.randn(1, 3, 257, 4), {}),
    ]
    with emulated_npu() as asked_for, ms_ops.backend(attention="npu"):
        for q, options in calls:
            out = ms_ops.attention(q, q, q, **options)
            with ms_ops.backend(attention="reference"):
                torch.testing.assert_close(out, ms_ops.attention(q, q, q, **options))
    assert asked_for == []


@pytest.mark.parametrize("reading", ["zero", "uniform"])
def test_rows_without_keys_whatever_the_kernel_gives_there(reading):
    with emulated_npu(Readings(empty_rows=reading)):
        for name in ("mask", "lower_right_12x5", "band_outside", "mask_causal_gqa"):
            one = testing.find_sample("attention", name, torch.float32)
            testing.check_values("attention", one, "npu")


def test_a_trace_asks_for_the_version_whose_numbers_are_tensors():
    torch._dynamo.reset()
    one = testing.find_sample("attention", "gqa_causal", torch.float32)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with emulated_npu(), ms_ops.backend(attention="npu"):
        compiled = torch.compile(ms_ops.attention, fullgraph=True, backend=backend)
        tensors = [t.detach().requires_grad_() for t in one.args]
        out, lse = compiled(*tensors, **one.kwargs)
        out.backward(torch.ones_like(out))
        eager = ms_ops.attention(*one.args, **one.kwargs)
    torch.testing.assert_close((out, lse), eager)
    names = {str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"}
    assert {
        "npu.npu_fusion_attention_v3.default",
        "npu.npu_fusion_attention_grad_v3.default",
    } <= names


def test_lengths_are_read_once_and_again_after_a_change():
    from ms_ops.attention.starts import ends_of

    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert ends_of(starts) == [2, 5]
    assert ends_of(starts) is ends_of(starts)
    starts[1] = 3
    assert ends_of(starts) == [3, 5]


def test_what_is_declined_says_why():
    q = torch.randn(2, 5, 4, 8)
    with emulated_npu():
        verdicts = ms_ops.explain("attention", q, q, q, dropout_p=0.5)
    assert "npu (priority 10): the kernel draws its dropout from a stream of its own" in verdicts
