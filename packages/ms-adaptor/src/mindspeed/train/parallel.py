"""Process groups and random seeds of one rank."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from mindspeed.train.config import TrainConfig


def ensure_process_group(timeout: float) -> bool:
    """Starts a world of one if torch.distributed is not initialised; says whether it did."""
    if dist.is_initialized():
        return False
    backend = _backend()
    dist.init_process_group(
        backend,
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=timeout),
    )
    return True


def _backend() -> str:
    from mindspeed import device

    descriptor = device.current()
    return descriptor.backend if descriptor is not None else "gloo"


def initialize(config: TrainConfig) -> None:
    """Builds Megatron's groups for this rank and seeds every generator.

    Raises:
        RuntimeError: Megatron's groups exist already, so another trainer is open.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("Megatron's process groups exist already, made by other code here")
    sizes = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout / 60,
    )
    torch.manual_seed(config.seed)
    model_parallel_cuda_manual_seed(config.seed)


def destroy() -> None:
    """Removes Megatron's groups and closes their connections; the world group stays."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
