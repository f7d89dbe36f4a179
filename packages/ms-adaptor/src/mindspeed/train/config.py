"""The training configuration: a frozen tree whose leaves carry Megatron's own names.

Every leaf name is unique across the sections, so the tree can be built from flat keywords
(`TrainConfig.of(num_layers=2, bf16=True)`), read flat (`config.flat()`) and changed flat
(`config.replace(tensor_model_parallel_size=2)`). Nothing here imports torch or Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT. Sizes are counts of elements, dropouts are probabilities."""

    num_layers: int = 2
    hidden_size: int = 64
    ffn_hidden_size: int | None = None
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    kv_channels: int | None = None
    seq_length: int = 32
    vocab_size: int = 257
    make_vocab_size_divisible_by: int = 128
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    swiglu: bool = False
    add_bias_linear: bool = True
    position_embedding_type: str = "rope"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    untie_embeddings_and_output_weights: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_method_std: float = 0.02


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts; dense when `num_experts` is None."""

    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layer_freq: int = 1
    moe_router_topk: int = 2
    moe_router_load_balancing_type: str = "aux_loss"
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float | None = None
    moe_token_dispatcher_type: str = "allgather"
    moe_grouped_gemm: bool = False
    moe_shared_expert_intermediate_size: int | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks divide the model and the batch; what is left over is data parallel."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    overlap_p2p_communication: bool | None = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation recomputation, in Megatron's terms."""

    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] | None = None
    distribute_saved_activations: bool = False


@dataclass(frozen=True)
class PrecisionConfig:
    """Compute type (fp32 unless one switch is on) and the fp16 loss scaler."""

    bf16: bool = False
    fp16: bool = False
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**16
    min_loss_scale: float = 1.0
    loss_scale_window: float = 1000.0
    hysteresis: int = 2
    accumulate_allreduce_grads_in_fp32: bool = False


@dataclass(frozen=True)
class FusionConfig:
    """Megatron's compiled small fusions, off by default: on a CPU they cost a compiler run."""

    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    cross_entropy_loss_fusion: bool = False
    apply_rope_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    moe_permute_fusion: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and what data parallelism does with gradients and states."""

    optimizer: str = "adam"
    lr: float = 3e-3
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    align_grad_reduce: bool = True
    align_param_gather: bool = True
    ddp_bucket_size: int | None = None
    ddp_average_in_collective: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Batch sizes and where the text comes from; no `data` means the built-in text."""

    micro_batch_size: int = 2
    global_batch_size: int | None = None
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    split: str = "95,5,0"
    eval_iters: int = 4
    eval_interval: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of one training job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: DataConfig = field(default_factory=DataConfig)
    train_iters: int = 10
    log_interval: int = 10
    seed: int = 1234
    optimization_level: int = 0
    distributed_timeout: float = 60.0
    feature_flags: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, **flat: Any) -> TrainConfig:
        """Builds a configuration from leaf names, for instance `of(num_layers=4, bf16=True)`.

        Raises:
            TypeError: a name is not a leaf of the tree.
        """
        return cls().replace(**flat)

    def replace(self, **flat: Any) -> TrainConfig:
        """A copy with the named leaves changed.

        Raises:
            TypeError: a name is not a leaf of the tree.
        """
        sections = section_of_leaf()
        unknown = sorted(set(flat) - set(sections))
        if unknown:
            raise TypeError(f"unknown training option {unknown[0]!r}; options: {sorted(sections)}")
        top = {name: value for name, value in flat.items() if sections[name] is None}
        grouped: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            section = sections[name]
            if section is not None:
                grouped.setdefault(section, {})[name] = value
        changed = {name: replace(getattr(self, name), **leaf) for name, leaf in grouped.items()}
        return replace(self, **top, **changed)

    def plan_values(self) -> dict[str, Any]:
        """What a level's plan reads: every leaf, and the flags of features above level 0."""
        flat = self.flat()
        return {**flat, **dict(flat.pop("feature_flags"))}

    def flat(self) -> dict[str, Any]:
        """Leaf name to value; tuples stay tuples."""
        out: dict[str, Any] = {}
        for name, section in section_of_leaf().items():
            out[name] = getattr(self if section is None else getattr(self, section), name)
        return out

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `flat`, also after a trip through JSON (lists become tuples)."""
        return cls.of(**{name: _frozen(value) for name, value in flat.items()})

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the dense model in `world_size` ranks."""
        return world_size // self.parallel.model_parallel_size

    def global_batch_size(self, world_size: int) -> int:
        """Samples of one optimizer step; one micro batch per copy unless it was set."""
        if self.batch.global_batch_size is not None:
            return self.batch.global_batch_size
        return self.batch.micro_batch_size * self.data_parallel_size(world_size)

    def num_microbatches(self, world_size: int) -> int:
        """Micro batches that each copy of the model runs in one step."""
        per_round = self.batch.micro_batch_size * self.data_parallel_size(world_size)
        return self.global_batch_size(world_size) // per_round

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up; the same for every tensor-parallel size, so losses compare."""
        multiple = self.model.make_vocab_size_divisible_by
        return -(-self.model.vocab_size // multiple) * multiple

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the feed-forward block: 4h, or 8h/3 rounded to 64 for a gated one."""
        model = self.model
        if model.ffn_hidden_size is not None:
            return model.ffn_hidden_size
        if not model.swiglu:
            return 4 * model.hidden_size
        return -(-8 * model.hidden_size // 3 // 64) * 64


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@cache
def section_of_leaf() -> dict[str, str | None]:
    """Leaf name to the section that holds it; None for the leaves of `TrainConfig` itself."""
    out: dict[str, str | None] = {}
    default = TrainConfig()
    for top in fields(TrainConfig):
        value = getattr(default, top.name)
        if is_dataclass(value):
            out.update({leaf.name: top.name for leaf in fields(value)})
        else:
            out[top.name] = None
    return out
