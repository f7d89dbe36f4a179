"""Attention on torch's CUDA kernels: emulated on the CPU, and on fake CUDA tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ms_ops
from ms_ops import opdef, testing
from ms_ops.attention import cuda, portable
from ms_ops.attention.call import Call
from support import cuda_kernels
from support.mutation import Mutation

KERNELS = {
    "flash": ("_flash_attention_forward", "_flash_attention_backward"),
    "efficient": (
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    ),
}
LOW = (torch.bfloat16, torch.float16)
FLASH = {
    "bshd_dense",
    "bshd_causal",
    "gqa_causal",
    "sbhd_causal",
    "mqa_causal",
    "wide_v_dense",
    "lower_right_12x5",
    "lower_right_1x7",
    "channel_strided",
    "window",
    "window_rectangle",
    "causal_window",
    "sink",
    "thd",
    "thd_cross",
    "thd_lower_right",
}
EFFICIENT = {
    "upper_left_6x12",
    "mask_causal_gqa",
    "mask_keys",
    "bias_constant",
    "bias_heads",
    "prefix",
    "edge",
    "starts",
}
BLOCKS = {
    "alibi",
    "bias",
    "dropout",
    "everything",
    "no_keys",
    "no_queries",
    "no_values",
    "thd_everything",
}


def forward(q, k, v, *rest):
    return cuda.forward(Call(*rest), q, k, v) or portable.forward(q, k, v, *rest)


def backward(dout, q, k, v, out, lse, *rest):
    tensors = (dout, q, k, v, out, lse)
    served = cuda.backward(Call(*rest[:-1]), *tensors, rest[-1])
    return served or portable.backward(*tensors, *rest)


@pytest.fixture
def calls():
    kernels = {"attention": ms_ops.Kernel(forward, backward)}
    ms_ops.register_backend("attention", ms_ops.Backend("emulated", 500, kernels))
    try:
        with cuda_kernels.emulated() as found:
            yield found
    finally:
        ms_ops.unregister_backend("attention", "emulated")


def routes(dtype):
    found = {}
    for sample in testing.OPERATORS["attention"].samples(dtype, "cpu"):
        prepared = opdef.OPERATORS["attention"].definition.prepare(*sample.args, **sample.kwargs)
        found[sample.name] = cuda.route(Call(*prepared[3:]), *prepared[:3])
    return found


def test_which_kernel_serves_what():
    found = routes(torch.bfloat16)
    for names, kernel in ((FLASH, "flash"), (EFFICIENT, "efficient"), (BLOCKS, "blocks")):
        assert {found[name] for name in names} == {kernel}, kernel
    assert set(routes(torch.float32).values()) == {"blocks"}


def check_all(dtype):
    for sample in testing.OPERATORS["attention"].samples(dtype, "cpu"):
        testing.check_values("attention", sample, "emulated")


@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
def test_outputs_and_gradients_on_emulated_kernels(calls, dtype):
    check_all(dtype)
    assert {name for name, _, _ in calls} == {name for names in KERNELS.values() for name in names}


class Recorder(TorchDispatchMode):
    """Keeps the calls of torch's attention kernels."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "_attention" in str(func):
            self.calls.append((str(func.overloadpacket).removeprefix("aten."), args, kwargs, out))
        return out


def without_data(name, device="meta"):
    """Run forward and backward of a sample on shapes alone; returns what torch was asked."""
    sample = testing.find_sample("attention", name, torch.bfloat16)
    definition = opdef.OPERATORS["attention"].definition
    prepared = definition.prepare(*sample.args, **sample.kwargs)
    run, differentiate = (portable.forward, portable.backward)
    if device == "meta":
        run, differentiate = forward, backward
    with FakeTensorMode() if device == "cuda" else nullcontext():
        empty = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device)
            if isinstance(a, torch.Tensor)
            else a
            for a in prepared
        ]
        with Recorder() as recorder:
            out, lse = run(*empty)
            dout = torch.empty_like(out)
            grads = differentiate(dout, *empty[:3], out, lse, *empty[3:], False)
        promised = definition.fake(*empty)
    assert [t.shape for t in (out, lse)] == [t.shape for t in promised]
    assert [t.dtype for t in (out, lse)] == [torch.bfloat16, torch.float32]
    assert [g.shape for g in grads[:3]] == [t.shape for t in empty[:3]]
    assert {t.device.type for t in (out, lse, *grads)} == {device}
    return recorder.calls


@pytest.mark.parametrize("name", sorted(FLASH | EFFICIENT))
def test_torch_takes_the_arguments(name):
    kernel = "flash" if name in FLASH else "efficient"
    names = [call[0] for call in without_data(name)]
    blocks = len(names) // 2
    first, second = KERNELS[kernel]
    assert names == [first] * blocks + [second] * blocks
    assert blocks >= 1


@pytest.mark.parametrize("name", ["bshd_dense", "gqa_causal", "window"])
def test_cuda_tensors_take_that_way(name):
    # Torch without CUDA slices no fake CUDA tensors: these samples need none of that.
    assert tuple(call[0] for call in without_data(name, "cuda")) == KERNELS["flash"]


def test_arguments_of_the_flash_kernel():
    (forward, backward) = without_data("lower_right_12x5")
    q, k, v, starts_q, starts_k, rows, keys, dropout, causal, debug = forward[1]
    assert (tuple(q.shape), tuple(k.shape), tuple(v.shape)) == ((2, 12, 4, 8), *[(2, 5, 2, 8)] * 2)
    assert (starts_q, starts_k, rows, keys, dropout, causal, debug) == (
        *(None, None, 12, 5, 0.0, True, False),
    )
    assert forward[2] == {"scale": pytest.approx(8**-0.5)}
    assert tuple(forward[3][1].shape) == (2, 4, 12)
    assert backward[1][6:12] == (None, None, 12, 5, 0.0, True)
    assert backward[2] == forward[2]
    (forward, _) = without_data("thd_lower_right")
    assert tuple(forward[3][1].shape) == (4, 15)
    assert forward[1][5:9] == (15, 17, 0.0, False)
    assert forward[2]["window_size_left"] == 5
    assert forward[2]["window_size_right"] == 0
    assert {t.dtype for t in forward[1][3:5]} == {torch.int32}


def test_arguments_of_the_memory_efficient_kernel():
    (forward, backward) = without_data("mask_causal_gqa")
    assert {tuple(t.shape) for t in forward[1][:3]} == {(2, 4, 9, 8)}
    assert tuple(forward[1][3].shape) == (2, 4, 9, 9)
    assert forward[1][3].stride()[2] == 16
    assert forward[1][4:] == (True,)  # and defaults: no dropout, no triangle
    assert tuple(forward[3][1].shape) == tuple(backward[1][6].shape) == (2, 4, 32)
    assert backward[1][9:] == (0.0, [True, True, True, False])
    (forward, backward) = without_data("upper_left_6x12")
    assert forward[1][3:] == (None, True, 0.0, True)
    assert backward[1][11] is True


def wrong(function, old, new):
    return Mutation(f"{old} -> {new}", f"ms_ops.attention.cuda:{function}", old, new)


MUTATIONS = [
    wrong("_flash_forward", "lse == math.inf, -math.inf", "lse == math.nan, -math.inf"),
    wrong("_flash_forward", "masked_fill(beyond.view(-1, 1, 1), 0.0)", "contiguous()"),
    wrong("_flash_grads", "-math.inf, math.inf", "-math.inf, -math.inf"),
    wrong("_flash_grads", "(rows, keys, keys)", "(rows, rows, keys)"),
    wrong("_flash_options", "-1 if left == UNBOUNDED else left", "-1"),
    wrong("_is_flash_band", "return same and", "return"),
    wrong("_is_exact", "call.bias_factor == 1.0", "True"),
    wrong("_efficient_operands", "None, call.banded", "None, False"),
    wrong("_efficient_operands", "-keys % COLUMNS", "0"),
    wrong("_efficient_forward", "lse.masked_fill(none, -math.inf)", "lse"),
    wrong("_efficient_grads", "-query.shape[2] % ROWS", "0"),
    wrong("_operand", "x if x.stride(-1) == 1 else x.contiguous()", "x"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutant_is_caught(calls, mutation):
    with mutation.applied(), pytest.raises((AssertionError, RuntimeError)):
        check_all(torch.bfloat16)
