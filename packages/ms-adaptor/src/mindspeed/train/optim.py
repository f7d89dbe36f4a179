"""Megatron's optimizer and its learning-rate and weight-decay schedule."""

from __future__ import annotations

from typing import Any

from mindspeed.features.memory.optim.streamed import TIMES
from mindspeed.features.ops.optimizer import EMA_DECAY
from mindspeed.train.config import TrainConfig
from mindspeed.train.model import Chunk, compute_dtype


def build_optimizer(config: TrainConfig, chunks: list[Chunk]) -> Any:
    """The optimizer over the wrapped chunks of this rank."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optim, precision = config.optim, config.precision
    options = OptimizerConfig(
        optimizer=optim.optimizer,
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        sgd_momentum=optim.sgd_momentum,
        clip_grad=optim.clip_grad,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=optim.overlap_param_gather,
        bf16=precision.bf16,
        fp16=precision.fp16,
        params_dtype=compute_dtype(config),
        loss_scale=precision.loss_scale,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.min_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
    )
    # No fields of Megatron's; the optimizers with averages and with states on the host read them.
    options.ema_decay = config.plan_values().get("ema_decay", EMA_DECAY)
    options.swap_optimizer_times = config.plan_values().get("swap_optimizer_times", TIMES)
    return get_megatron_optimizer(options, chunks)


def build_scheduler(config: TrainConfig, optimizer: Any, global_batch_size: int) -> Any:
    """The schedule, counted in samples as Megatron counts it."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optim = config.optim
    decay_iters = optim.lr_decay_iters or config.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters * global_batch_size,
        lr_decay_steps=decay_iters * global_batch_size,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.train_iters * global_batch_size,
        wd_incr_style="constant",
    )
