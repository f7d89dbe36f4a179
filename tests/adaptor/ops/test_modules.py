"""The modules and functions of level 1 against Megatron's own, one by one."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed.features.ops import (
    attention,
    attention_window,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from support.ranks import run_ranks

# Megatron compiles its small functions; eager ones compute the same and start at once.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}


def in_megatron(function, *args):
    return run_ranks(function, 1, *args, preload="megatron", env=EAGER)[0]


def config(**options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    return TransformerConfig(**{**shape, "attention_dropout": 0.0, **options})


def attention_pair(options, mask_type, layer):
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from mindspeed.features.ops.attention_module import FusedAttention

    kind = AttnMaskType[mask_type]
    args = (config(**options), layer, kind, "self")
    return DotProductAttention(*args), FusedAttention(*args)


def run_attention(module, mask):
    torch.manual_seed(1)
    q, k, v = (torch.randn(12, 2, n, 8, requires_grad=True) for n in (4, 2, 2))
    out = module(q, k, v, mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    return [out.detach(), *grads]


def attention_results(rank, world_size, options, mask_type, masked, layer):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    mask = None
    if masked == "triangle":
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    if masked == "documents":
        document = torch.arange(12) >= 7
        mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
        mask = (mask | (document[:, None] != document[None, :])).expand(2, 1, 12, 12)
    return [run_attention(m, mask) for m in attention_pair(options, mask_type, layer)]


@pytest.mark.parametrize(
    ("options", "mask_type", "masked", "layer"),
    [
        ({}, "causal", None, 1),
        ({}, "causal", "triangle", 1),
        ({}, "causal", "documents", 1),
        ({}, "no_mask", None, 1),
        ({}, "padding", "documents", 1),
        ({}, "arbitrary", "triangle", 1),
        ({"apply_query_key_layer_scaling": True}, "causal", None, 3),
        ({"window_size": (3, 0)}, "causal", None, 1),
        ({"window_size": (4, 1)}, "causal", "documents", 1),
        ({"window_size": (3, 0), "window_attn_skip_freq": 2}, "causal", None, 2),
        ({"softmax_type": "off-by-one"}, "causal", None, 1),
    ],
)
def test_attention(options, mask_type, masked, layer):
    theirs, ours = in_megatron(attention_results, options, mask_type, masked, layer)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def fallback_calls(rank, world_size):
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from mindspeed.features.ops.attention_module import FusedAttention

    parallel_state.initialize_model_parallel()
    calls = []

    def forward(self, query, *args, **kwargs):
        calls.append("megatron")
        return torch.zeros(1)

    DotProductAttention.forward = forward
    q = torch.randn(4, 1, 4, 8)
    k = torch.randn(4, 1, 2, 8)

    def call(training, mask_type=AttnMaskType.causal, **options):
        module = FusedAttention(config(**options), 1, mask_type, "self").train(training)
        calls.clear()
        module(q, k, k, None)
        return bool(calls)

    return {
        "plain": call(True),
        "dropout": call(True, attention_dropout=0.1),
        "dropout_in_eval": call(False, attention_dropout=0.1),
        "softmax_offset": call(True, softmax_type="off-by-one"),
        "window": call(True, window_size=(2, 0)),
        "padding_causal": call(True, AttnMaskType.padding_causal),
    }


def test_what_the_operator_lacks_stays_with_megatron():
    assert in_megatron(fallback_calls) == {
        "plain": False,
        "dropout": True,
        "dropout_in_eval": False,
        "softmax_offset": False,
        "window": False,
        "padding_causal": True,
    }


def packed_results(rank, world_size):
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from mindspeed.features.ops.attention_module import FusedAttention

    parallel_state.initialize_model_parallel()
    torch.manual_seed(7)
    q, k, v = (torch.randn(9, n, 8) for n in (4, 2, 2))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    module = FusedAttention(config(), 1, AttnMaskType.causal, "self")
    out = module(q, k, v, None, packed_seq_params=packed)
    apart = [
        module(*(t[a:b].unsqueeze(1) for t in (q, k, v)), None).squeeze(1)
        for a, b in ((0, 4), (4, 9))
    ]
    bias = torch.randn(1, 4, 9, 9)
    biased = module(*(t.unsqueeze(1) for t in (q, k, v)), None, attention_bias=bias)
    failures = []
    full = FusedAttention(config(), 1, AttnMaskType.padding, "self")
    padded = {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts}
    dropping = FusedAttention(config(attention_dropout=0.1), 1, AttnMaskType.causal, "self")
    for wrong, params in (
        (full, PackedSeqParams("thd", starts, starts, **padded)),
        (module, PackedSeqParams("bshd", starts, starts)),
        (dropping, packed),
    ):
        try:
            wrong(q, k, v, None, packed_seq_params=params)
        except ValueError as error:
            failures.append(str(error))
    return out, torch.cat(apart), biased.shape, failures


def test_packed_sequences_and_bias():
    out, apart, shape, failures = in_megatron(packed_results)
    torch.testing.assert_close(out, apart, rtol=1e-6, atol=1e-6)
    assert shape == (9, 1, 32)
    needs = ("need none: the padding", "need 'thd'", "need attention_dropout 0")
    assert len(failures) == len(needs)
    assert all(need in text for need, text in zip(needs, failures, strict=True))


def test_window_flags_become_the_window_size():
    from mindspeed.features.ops import attention_window as feature

    assert feature.window({}) is None
    assert feature.window({"pre_tokens": 65536, "next_tokens": 0, "sparse_mode": 2}) is None
    assert feature.window({"sparse_mode": 4}) == (65536, 0)
    assert feature.window({"pre_tokens": 128}) == (128, 0)
    assert feature.window({"pre_tokens": 8, "next_tokens": 2, "sparse_mode": 4}) == (8, 2)


def softmax_results(rank, world_size):
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    from mindspeed.features.ops.softmax_function import wrap_softmax

    theirs = FusedScaleMaskSoftmax.forward_torch_softmax
    calls = []

    def original(self, *args):
        calls.append(len(args))
        return theirs(self, *args)

    ours, results = wrap_softmax(original), []
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    for low, kind, given, scale, columns in (
        (False, "causal", None, None, 9),
        (False, "causal", mask, 0.7, 9),
        (True, "padding", mask[..., :7], 0.7, 7),
        (True, "padding", None, None, 7),
    ):
        module = FusedScaleMaskSoftmax(
            False, low, AttnMaskType[kind], False, attention_mask_func, True, scale
        )
        torch.manual_seed(3)
        x = torch.randn(2, 3, 9, columns).to(torch.bfloat16 if low else torch.float32)
        x.requires_grad_()
        dy = torch.randn(x.shape).to(x.dtype)
        pair = []
        for function in (theirs, ours):
            y = function(module, x * 1, given)
            pair.append([y.detach(), *torch.autograd.grad(y, x, dy)])
        results.append(pair)
    before = len(calls)
    module.mask_func = lambda scores, mask: scores.masked_fill(mask, -10000.0)
    ours(module, x, mask[..., :7])
    ours(module, x, None, torch.zeros(3))
    return results, before, calls


def test_softmax():
    results, before, calls = in_megatron(softmax_results)
    for theirs, mine in results:
        rtol, atol = (1.6e-2, 1e-3) if mine[0].dtype is torch.bfloat16 else (1e-5, 1e-6)
        for got, wanted in zip(mine, theirs, strict=True):
            assert got.dtype is wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
    assert before == 0
    assert calls == [2, 3]


def rope_results(rank, world_size, kwargs, width):
    from megatron.core.models.common.embeddings import rope_utils

    from mindspeed.features.ops.rope_function import apply_bshd

    torch.manual_seed(2)
    t = torch.randn(9, 2, 3, 8, requires_grad=True)
    freqs = torch.randn(9, 1, 1, width)
    results = []
    for function in (rope_utils._apply_rotary_pos_emb_bshd, apply_bshd, apply_bshd):
        y = function(t, freqs, **kwargs)
        torch.manual_seed(3)
        results.append([y.detach(), *torch.autograd.grad(y, t, torch.randn_like(y))])
    freqs.mul_(0.5)
    changed = [
        f(t, freqs, **kwargs).detach() for f in (rope_utils._apply_rotary_pos_emb_bshd, apply_bshd)
    ]
    return results, changed


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"rotary_interleaved": True},
        {"mscale": 1.3},
        {"multi_latent_attention": True, "mscale": 0.7},
    ],
)
def test_rope(kwargs, width):
    (theirs, ours, again), changed = in_megatron(rope_results, kwargs, width)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0], again[0])
    torch.testing.assert_close(changed[1], changed[0], rtol=1e-5, atol=1e-6)


def norm_results(rank, world_size, options):
    from mindspeed.features.level0.norm import build_norm
    from mindspeed.features.ops.norm_module import Norm

    settings = config(**options)
    theirs, ours = build_norm(settings, 32, 1e-5), Norm(settings, 32, eps=1e-5)
    torch.manual_seed(4)
    x = torch.randn(5, 2, 32, dtype=settings.params_dtype)
    weight = torch.randn(32, dtype=settings.params_dtype)
    results = []
    for norm in (theirs, ours):
        start = norm.weight.detach().clone()
        with torch.no_grad():
            norm.weight.copy_(weight)
        tags = [p.sequence_parallel for p in norm.parameters()]
        results.append((start, norm(x).detach(), sorted(norm.state_dict()), tags))
    return results


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(normalization, zero_centered, dtype):
    options = {
        "normalization": normalization,
        "layernorm_zero_centered_gamma": zero_centered,
        "params_dtype": dtype,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_dtype": dtype,
    }
    theirs, ours = in_megatron(norm_results, options)
    assert torch.equal(ours[0], theirs[0])
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (1.6e-2, 1e-2)
    torch.testing.assert_close(ours[1], theirs[1], rtol=rtol, atol=atol)
    assert ours[2:] == theirs[2:]
    assert all(ours[3])


def swiglu_results(rank, world_size, biased, kwargs):
    from megatron.core.fusions import fused_bias_swiglu

    from mindspeed.features.ops.swiglu_function import bias_swiglu_impl

    torch.manual_seed(5)
    x = torch.randn(4, 2, 12, requires_grad=True)
    bias = torch.randn(12, requires_grad=True) if biased else None
    leaves = [t for t in (x, bias) if t is not None]
    results = []
    for function in (fused_bias_swiglu.bias_swiglu_impl, bias_swiglu_impl):
        y = function(x, bias, **kwargs)
        torch.manual_seed(6)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))])
    return results


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(biased):
    theirs, ours = in_megatron(swiglu_results, biased, {})
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu_with_fp8_input_stored(biased):
    theirs, ours = in_megatron(swiglu_results, biased, {"fp8_input_store": True})
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def weighted_results(rank, world_size, kwargs):
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl as theirs

    from mindspeed.features.ops.swiglu_function import weighted_bias_swiglu_impl as ours

    torch.manual_seed(5)
    x, weights = torch.randn(8, 12, requires_grad=True), torch.rand(8, 1, requires_grad=True)
    results = []
    for function in (theirs, ours):
        y = function(x, None, weights, **kwargs)
        torch.manual_seed(6)
        results.append([y.detach(), *torch.autograd.grad(y, (x, weights), torch.randn_like(y))])
    return results


@pytest.mark.parametrize("kwargs", [{}, {"fp8_input_store": True}], ids=["plain", "fp8"])
def test_weighted_swiglu(kwargs):
    theirs, ours = in_megatron(weighted_results, kwargs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_what_swiglu_keeps_is_marked_for_offloading():
    from mindspeed.features.ops.swiglu_function import bias_swiglu_impl

    x, bias = torch.randn(4, 12), torch.randn(12)
    bias_swiglu_impl(x, bias, cpu_offload_input=True)
    assert x.activation_offloading
    assert bias.activation_offloading


def spec_classes(rank, world_size):
    from mindspeed.features.ops.provider import layer_spec

    layer = layer_spec(normalization="RMSNorm", qk_layernorm=True).submodules
    inner = layer.self_attention.submodules
    places = (
        layer.input_layernorm,
        layer.pre_mlp_layernorm,
        inner.core_attention,
        inner.q_layernorm,
        inner.k_layernorm,
    )
    return [place.__name__ for place in places]


def test_layer_spec_needs_no_patch():
    assert in_megatron(spec_classes) == ["Norm", "Norm", "FusedAttention", "Norm", "Norm"]


def test_norms_of_other_libraries_stay():
    def block(name):
        return SimpleNamespace(LayerNormImpl=type(name, (), {}))

    assert rms_norm.is_torch_norm(block("WrappedTorchNorm"))
    assert not rms_norm.is_torch_norm(block("TENorm"))


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (attention, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (attention, {"seq_length": 32}, "expect no gain"),
        (attention, {"seq_length": 1024}, "pays from"),
        (attention_window, {"seq_length": 100}, "nothing is saved"),
        (attention_window, {"seq_length": 100, "pre_tokens": 9}, "10% of the keys"),
        (rms_norm, {"normalization": "LayerNorm"}, "nothing changes"),
        (rms_norm, {"normalization": "RMSNorm"}, "pays at every size"),
        (softmax, {}, "nothing changes"),
        (softmax, {"attention_dropout": 0.1, "bf16": True}, "in 16 bits"),
        (softmax, {"attention_dropout": 0.1}, "every training step"),
        (rope, {"position_embedding_type": "none"}, "nothing to rotate"),
        (rope, {"position_embedding_type": "rope"}, "pays at every size"),
        (swiglu, {}, "not gated"),
        (swiglu, {"swiglu": True, "bias_swiglu_fusion": False}, "turn it on"),
        (swiglu, {"swiglu": True}, "pays at every size"),
    ],
)
def test_advice(module, options, words):
    assert words in module.advise(SimpleNamespace(**options))
    assert module.FEATURE.advise == f"{module.__name__}:advise"
