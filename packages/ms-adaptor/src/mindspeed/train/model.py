"""The GPT of one rank: configuration, layer specification, chunks, data-parallel wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mindspeed.features.context import settings as context
from mindspeed.features.memory import settings as memory
from mindspeed.features.memory.planner import settings as planner
from mindspeed.features.ops.alibi import mark
from mindspeed.features.ops.attention_window import window
from mindspeed.train.config import TrainConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


# A model of Megatron, wrapped or not; its attributes are not typed.
Chunk = Any


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The type of weights and activations."""
    if config.precision.bf16:
        return torch.bfloat16
    return torch.float16 if config.precision.fp16 else torch.float32


def transformer_config(config: TrainConfig) -> TransformerConfig:
    """Translates our tree into Megatron's configuration object."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = compute_dtype(config)
    core = TransformerConfig(
        use_cpu_initialization=True,
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision.bf16,
        fp16=config.precision.fp16,
        deterministic_mode=bool(config.plan_values().get("npu_deterministic")),
        **_shape_options(config),
        **_parallel_options(config),
        **_expert_options(config),
        **_recompute_options(config),
        **_fusion_options(config),
    )
    mark(core, config.plan_values())
    context.mark(core, config.plan_values())
    memory.mark(core, config.plan_values())
    planner.mark(core, config.plan_values())
    return core


def _fusion_options(config: TrainConfig) -> dict[str, Any]:
    options = dict(vars(config.fusion))
    # Level 1 serves these two without compiling them.
    if config.optimization_level >= 1:
        options["cross_entropy_loss_fusion"] = True
        options["bias_activation_fusion"] |= config.model.swiglu
    return options


def _shape_options(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    options: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "add_bias_linear": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_method_std,
        "gated_linear_unit": model.swiglu,
        "window_size": window(config.plan_values()),
    }
    if model.swiglu:
        options["activation_func"] = torch.nn.functional.silu
    return options


def _parallel_options(config: TrainConfig) -> dict[str, Any]:
    sizes = config.parallel
    # Batched exchange is wrong with virtual stages at two ranks, and the overlapped one is
    # only implemented for virtual stages.
    overlap = sizes.virtual_pipeline_model_parallel_size is not None
    if sizes.overlap_p2p_communication is not None:
        overlap = overlap and sizes.overlap_p2p_communication
    return {
        "tensor_model_parallel_size": sizes.tensor_model_parallel_size,
        "sequence_parallel": sizes.sequence_parallel,
        "pipeline_model_parallel_size": sizes.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline_model_parallel_size,
        "context_parallel_size": sizes.context_parallel_size,
        "expert_model_parallel_size": sizes.expert_model_parallel_size,
        "expert_tensor_parallel_size": sizes.expert_tensor_parallel_size,
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": not overlap,
        "deallocate_pipeline_outputs": True,
    }


def _expert_options(config: TrainConfig) -> dict[str, Any]:
    moe = config.moe
    if moe.num_experts is None:
        return {}
    options = {name: value for name, value in vars(moe).items() if name != "num_experts"}
    # A feed-forward width for experts of its own is optional; Megatron falls back with a warning.
    options["moe_ffn_hidden_size"] = moe.moe_ffn_hidden_size or config.ffn_hidden_size
    return {"num_moe_experts": moe.num_experts, **options}


def _recompute_options(config: TrainConfig) -> dict[str, Any]:
    options = dict(vars(config.recompute))
    if options["recompute_modules"] is not None:
        options["recompute_modules"] = list(options["recompute_modules"])
    return options


def build_chunks(config: TrainConfig) -> list[Chunk]:
    """The unwrapped model chunks of this rank, one per virtual stage, with initial weights."""
    from megatron.core import parallel_state

    from mindspeed.train.initial import initialize_by_name

    core = transformer_config(config)
    stages = config.parallel.virtual_pipeline_model_parallel_size
    last = config.parallel.pipeline_model_parallel_size - 1
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for index in range(stages or 1):
        chunk = _build_chunk(
            config,
            core,
            vp_stage=None if stages is None else index,
            pre_process=stage == 0 and index == 0,
            post_process=stage == last and index == (stages or 1) - 1,
        )
        chunks.append(chunk)
    initialize_by_name(chunks, core, config.seed)
    return chunks


def _build_chunk(
    config: TrainConfig,
    core: TransformerConfig,
    *,
    vp_stage: int | None,
    pre_process: bool,
    post_process: bool,
) -> Chunk:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    model = config.model
    chunk: Chunk = GPTModel(
        config=core,
        transformer_layer_spec=_layer_spec(config, core, vp_stage),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    for parameter in chunk.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunk


def _layer_spec(config: TrainConfig, core: TransformerConfig, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs

    model, moe = config.model, config.moe
    if moe.num_experts is not None:
        return specs.get_gpt_decoder_block_spec(
            core,
            use_transformer_engine=False,
            normalization=model.normalization,
            vp_stage=vp_stage,
        )
    return specs.get_gpt_layer_local_spec(
        qk_layernorm=model.qk_layernorm, normalization=model.normalization
    )


def wrap_chunks(config: TrainConfig, chunks: list[Chunk]) -> list[Chunk]:
    """Adds the low-precision module and Megatron's data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    optim, precision = config.optim, config.precision
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.accumulate_allreduce_grads_in_fp32 or precision.bf16,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
        align_param_gather=optim.align_param_gather,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        average_in_collective=optim.ddp_average_in_collective,
        bucket_size=optim.ddp_bucket_size,
    )
    low = precision.bf16 or precision.fp16
    wrapped = []
    for index, chunk in enumerate(chunks):
        core = chunk.config
        inner = Float16Module(core, chunk) if low else chunk
        # Only the first chunk's reduction can hide behind another chunk's backward.
        wrapped.append(
            DistributedDataParallel(
                config=core, ddp_config=ddp, module=inner, disable_bucketing=index > 0
            )
        )
    return wrapped


def unwrap(chunk: Chunk) -> Chunk:
    """The GPT inside the data-parallel and low-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
