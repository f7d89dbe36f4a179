"""Checks of a configuration against a number of processes, before any process starts."""

from __future__ import annotations

from collections.abc import Iterator

from mindspeed.features.memory.settings import settings
from mindspeed.train.config import TrainConfig

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "position_embedding_type": ("rope", "learned_absolute", "none", "alibi"),
    "moe_token_dispatcher_type": ("allgather", "alltoall"),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "sinkhorn", "none"),
    "recompute_granularity": (None, "full", "selective"),
    "recompute_method": (None, "uniform", "block"),
    "optimizer": ("adam", "sgd"),
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root"),
}
_POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "recompute_num_layers",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "log_interval",
    "lr",
    "distributed_timeout",
    "init_method_std",
    "lr_decay_iters",
    "eval_interval",
)
_NOT_NEGATIVE = (
    "min_lr",
    "weight_decay",
    "clip_grad",
    "lr_warmup_iters",
    "eval_iters",
    "moe_aux_loss_coeff",
    "seed",
)
_PROBABILITY = ("attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2")


class ConfigError(ValueError):
    """A training option that cannot work, with what it needs."""


def flag(name: str) -> str:
    """The command-line spelling of a leaf name."""
    return "--" + name.replace("_", "-")


def check(config: TrainConfig, world_size: int) -> None:
    """Raises if the configuration cannot run on `world_size` ranks.

    Raises:
        ConfigError: lists every problem, one a line.
    """
    problems = [
        *_ranges(config),
        *_sizes(config, world_size),
        *_combinations(config),
        *_memory(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _memory(config: TrainConfig) -> Iterator[str]:
    try:
        settings(config.plan_values())
    except ValueError as error:
        yield str(error)


def _ranges(config: TrainConfig) -> Iterator[str]:
    values = config.flat()
    for name in _POSITIVE:
        if values[name] is not None and not values[name] > 0:
            yield f"{flag(name)} must be greater than 0, got {values[name]}"
    for name in _NOT_NEGATIVE:
        if values[name] < 0:
            yield f"{flag(name)} must not be negative, got {values[name]}"
    for name in _PROBABILITY:
        if not 0 <= values[name] < 1:
            yield f"{flag(name)} must lie in [0, 1), got {values[name]}"
    for name, allowed in _CHOICES.items():
        if values[name] not in allowed:
            wanted = ", ".join(str(item) for item in allowed if item is not None)
            yield f"{flag(name)} must be one of {wanted}, got {values[name]!r}"


def _divides(what: str, size: int, by: str, divisor: int) -> Iterator[str]:
    if divisor > 0 and size % divisor:
        yield f"{what} ({size}) is not divisible by {by} ({divisor})"


def _sizes(config: TrainConfig, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if min(tp, pp, parallel.context_parallel_size) < 1:
        return
    copy = parallel.model_parallel_size
    yield from _divides("the number of processes", world_size, f"tensor {tp} x pipeline {pp}", copy)
    yield from _divides(
        "--hidden-size", model.hidden_size, "--num-attention-heads", model.num_attention_heads
    )
    yield from _divides(
        "--num-attention-heads", model.num_attention_heads, "--tensor-model-parallel-size", tp
    )
    groups = model.num_query_groups
    if groups:
        yield from _divides(
            "--num-attention-heads", model.num_attention_heads, "--num-query-groups", groups
        )
        yield from _divides("--num-query-groups", groups, "--tensor-model-parallel-size", tp)
    yield from _divides(
        "--ffn-hidden-size", config.ffn_hidden_size, "--tensor-model-parallel-size", tp
    )
    yield from _divides(
        "the padded vocabulary", config.padded_vocab_size, "--tensor-model-parallel-size", tp
    )
    chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    yield from _divides(
        "--num-layers", model.num_layers, "pipeline stages (with virtual ones)", chunks
    )
    if parallel.sequence_parallel:
        yield from _divides("--seq-length", model.seq_length, "--tensor-model-parallel-size", tp)
    if world_size % copy == 0 and config.batch.micro_batch_size > 0:
        yield from _batch_sizes(config, world_size)
    if config.moe.num_experts:
        yield from _expert_sizes(config, world_size)


def _batch_sizes(config: TrainConfig, world_size: int) -> Iterator[str]:
    copies = config.data_parallel_size(world_size)
    per_round = config.batch.micro_batch_size * copies
    size = config.global_batch_size(world_size)
    by = f"--micro-batch-size {config.batch.micro_batch_size} x data-parallel size {copies}"
    problems = list(_divides("--global-batch-size", size, by, per_round))
    yield from problems
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual and not problems:
        pp = config.parallel.pipeline_model_parallel_size
        rounds = config.num_microbatches(world_size)
        yield from _divides(
            "the number of micro batches", rounds, "--pipeline-model-parallel-size", pp
        )


def _expert_sizes(config: TrainConfig, world_size: int) -> Iterator[str]:
    parallel, experts = config.parallel, config.moe.num_experts or 0
    ep = parallel.expert_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    yield from _divides("--num-experts", experts, "--expert-model-parallel-size", ep)
    pp = parallel.pipeline_model_parallel_size
    by = f"expert {ep} x expert tensor {etp} x pipeline {pp}"
    yield from _divides("the number of processes", world_size, by, ep * etp * pp)
    if config.moe.moe_router_topk > experts:
        yield f"--moe-router-topk ({config.moe.moe_router_topk}) exceeds --num-experts ({experts})"


def _combinations(config: TrainConfig) -> Iterator[str]:
    parallel, optim, recompute = config.parallel, config.optim, config.recompute
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    rules = (
        (config.precision.bf16 and config.precision.fp16, "--bf16 and --fp16 exclude each other"),
        (
            dict(config.feature_flags).get("attention_mask_type") == "general",
            "--attention-mask-type general needs masks in the batches, "
            "and this command's have none",
        ),
        (
            parallel.context_parallel_size > 1 and config.optimization_level < 2,
            "--context-parallel-size above 1 needs a context-parallel attention: "
            "give --optimization-level 2",
        ),
        (
            parallel.sequence_parallel and tp == 1,
            "--sequence-parallel needs --tensor-model-parallel-size above 1",
        ),
        (
            virtual and pp == 1,
            "virtual pipeline stages need --pipeline-model-parallel-size above 1",
        ),
        (
            virtual and pp == 2 and parallel.overlap_p2p_communication is False,
            "virtual stages at --pipeline-model-parallel-size 2 need overlapped point-to-point "
            "communication: batched exchange gives wrong gradients there; "
            "leave out --no-overlap-p2p-communication",
        ),
        (
            optim.overlap_param_gather and not optim.use_distributed_optimizer,
            "--overlap-param-gather needs --use-distributed-optimizer",
        ),
        (
            optim.overlap_param_gather and not optim.overlap_grad_reduce,
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
        (
            recompute.recompute_granularity == "full" and not recompute.recompute_method,
            "--recompute-granularity full needs --recompute-method uniform or block",
        ),
        (
            recompute.recompute_granularity == "full" and not recompute.recompute_num_layers,
            "--recompute-granularity full needs --recompute-num-layers",
        ),
        (
            recompute.recompute_granularity == "selective" and recompute.recompute_method,
            "--recompute-method belongs to --recompute-granularity full, not selective",
        ),
        (
            recompute.recompute_method
            and not recompute.recompute_granularity
            and not dict(config.feature_flags).get("swap_attention"),
            "--recompute-method needs --recompute-granularity full, or --swap-attention",
        ),
        (
            parallel.expert_model_parallel_size > 1 and not config.moe.num_experts,
            "--expert-model-parallel-size above 1 needs --num-experts",
        ),
        (
            bool(config.moe.num_experts) and tp > 1 and not parallel.sequence_parallel,
            "experts with --tensor-model-parallel-size above 1 need --sequence-parallel",
        ),
        (
            optim.min_lr > optim.lr,
            f"--min-lr ({optim.min_lr}) must not exceed --lr ({optim.lr})",
        ),
        (
            optim.lr_warmup_iters >= (optim.lr_decay_iters or config.train_iters),
            f"--lr-warmup-iters ({optim.lr_warmup_iters}) must be smaller than the "
            f"{optim.lr_decay_iters or config.train_iters} steps of the schedule",
        ),
    )
    yield from (text for broken, text in rules if broken)
