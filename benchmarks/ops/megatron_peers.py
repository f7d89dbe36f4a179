"""Megatron-LM's own code for what the operators do, as peers of the benchmarks."""

import functools

import torch
import torch.distributed as dist


@functools.cache
def core():
    """Join a group of one process on this device; return what the peers need of Megatron."""
    import mindspeed.device

    mindspeed.device.install("cpu")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    @functools.cache
    def attention(heads, groups, channels, dtype):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=heads * channels,
            num_attention_heads=heads,
            num_query_groups=groups,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
            attention_softmax_in_fp32=dtype is not torch.float32,
            bf16=dtype is torch.bfloat16,
        )
        return DotProductAttention(config, 1, AttnMaskType.causal, "self")

    return {"swiglu": bias_swiglu_impl, "rope": _apply_rotary_pos_emb_bshd, "attention": attention}


def swiglu(x):
    return core()["swiglu"](x, None)


def rope(x, angles):
    return core()["rope"](x, angles)


def attention(q, k, v):
    """Causal, on [s, b, heads, d]; the mask is made once, as a data loader does."""
    module = core()["attention"](q.shape[2], k.shape[2], q.shape[3], q.dtype)
    out = module(q, k, v, _mask(q.shape[0]))
    return out.unflatten(-1, (q.shape[2], v.shape[3]))


@functools.cache
def _mask(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
