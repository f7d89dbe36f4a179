"""Saving and loading through Megatron's distributed checkpoint.

    <folder>/latest_checkpointed_iteration.txt      the newest complete step
    <folder>/iter_0000020/train_state.json          written last: step, world size, configuration
    <folder>/iter_0000020/metadata.json, common.pt, *.distcp

A checkpoint is written under a temporary name and renamed when complete, so an interrupted save
never leaves something that looks like a checkpoint, and never harms an older one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mindspeed.train.averages import averaging, drop_averages, restart_averages
from mindspeed.train.config import TrainConfig
from mindspeed.train.model import Chunk, unwrap
from mindspeed.train.state import (
    STATE_FILE,
    TRACKER_FILE,
    CheckpointError,
    checkpoint_folder,
    compare,
    read_state,
)

if TYPE_CHECKING:
    from mindspeed.train.trainer import Trainer


@dataclass
class PendingSave:
    """A save that may still be running in another process.

    Attributes:
        path: the folder the checkpoint will have when complete.
    """

    path: Path
    _poll: Callable[[bool], bool] = field(default=lambda wait: True)

    def done(self, wait: bool = False) -> bool:
        """Whether the checkpoint is complete; with `wait`, only returns when it is."""
        return self._poll(wait)


def save(trainer: Trainer, folder: Path, *, asynchronous: bool) -> PendingSave:
    """Writes the trainer's state below `folder`; every rank takes part."""
    from megatron.core import dist_checkpointing

    target = folder / f"iter_{trainer.step_count:07d}"
    partial = folder / f".{target.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    record = _state_record(trainer)
    request = dist_checkpointing.save(
        _state_dict(trainer, loading=False, optimizer=record["optimizer"]),
        str(partial),
        async_sharded_save=asynchronous,
        content_metadata=_metadata(trainer, for_storage=True),
    )

    def publish() -> None:
        if dist.get_rank() == 0:
            _publish(partial, target, record)
        dist.barrier()

    if request is None:
        publish()
        return PendingSave(target)
    request.add_finalize_fn(publish)
    return PendingSave(target, _schedule(request))


def _schedule(request: Any) -> Callable[[bool], bool]:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)

    def poll(wait: bool) -> bool:
        if queue.get_num_unfinalized_calls():
            queue.maybe_finalize_async_calls(blocking=wait)
        if queue.get_num_unfinalized_calls():
            return False
        queue.close()
        return True

    return poll


def _publish(partial: Path, target: Path, record: dict[str, Any]) -> None:
    (partial / STATE_FILE).write_text(json.dumps(record, indent=1) + "\n")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    tracker = target.parent / TRACKER_FILE
    fresh = tracker.with_suffix(".new")
    fresh.write_text(f"{record['step']}\n")
    os.replace(fresh, tracker)


def load(trainer: Trainer, folder: Path, *, reshard: bool) -> int:
    """Reads the newest state into the trainer; every rank takes part.

    Raises:
        CheckpointError: see `Trainer.load`.
    """
    from megatron.core import dist_checkpointing

    path = checkpoint_folder(folder)
    record = read_state(path)
    compare(record, trainer.config, trainer.world_size, reshard=reshard)
    same_layout = _layout(record["config"], record["world_size"]) == _layout(
        trainer.config.flat(), trainer.world_size
    )
    wanted = _state_dict(trainer, loading=True, optimizer=record["optimizer"])
    averages = averaging(trainer.config.plan_values())
    restart = averages and not averaging(TrainConfig.from_flat(record["config"]).plan_values())
    if restart:
        drop_averages(wanted)
    if not same_layout:
        del wanted["rng_state"]
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    for key, chunk in _chunk_keys(trainer):
        unwrap(chunk).load_state_dict(loaded[key])
    if record["optimizer"]:
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        if restart:
            restart_averages(trainer.optimizer)
    else:
        trainer.optimizer.reload_model_params()
        for scaler, state in zip(_scalers(trainer), loaded["loss_scalers"], strict=True):
            scaler.load_state_dict(state)
    # Loading adds the stored steps to those already counted.
    trainer.scheduler.num_steps = 0
    trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        set_random_state(loaded["rng_state"])
    return int(record["step"])


def _layout(flat: dict[str, Any], world_size: int) -> tuple[Any, ...]:
    sizes = [flat[name] for name in sorted(flat) if name.endswith("parallel_size")]
    return world_size, *sizes


def _state_record(trainer: Trainer) -> dict[str, Any]:
    import megatron.core

    import mindspeed

    return {
        "step": trainer.step_count,
        "consumed_samples": trainer.step_count * trainer.num_samples_per_step,
        "world_size": trainer.world_size,
        "config": trainer.config.flat(),
        # As long as every step overflowed, Megatron's optimizer has no state to speak of.
        "optimizer": trainer.scheduler.num_steps > 0,
        "versions": {
            "mindspeed": mindspeed.__version__,
            "megatron-core": megatron.core.__version__,
            "torch": torch.__version__,
        },
    }


def _sharding_type() -> str:
    """How a distributed optimizer's state is stored, so that any layout can read it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    known = getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())
    return "fully_reshardable" if "fully_reshardable" in known else "fully_sharded_model_space"


def _metadata(trainer: Trainer, *, for_storage: bool) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": _sharding_type(),
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if not for_storage:
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata


def _chunk_keys(trainer: Trainer) -> list[tuple[str, Chunk]]:
    if len(trainer.chunks) == 1:
        return [("model", trainer.chunks[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(trainer.chunks)]


def _scalers(trainer: Trainer) -> list[Any]:
    optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    scalers = [getattr(each, "grad_scaler", None) for each in optimizers]
    return [scaler for scaler in scalers if scaler is not None]


def _state_dict(trainer: Trainer, *, loading: bool, optimizer: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    metadata = _metadata(trainer, for_storage=False)
    state: dict[str, Any] = {
        key: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for key, chunk in _chunk_keys(trainer)
    }
    if optimizer:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            state, is_loading=loading, metadata=metadata
        )
    state["loss_scalers"] = [scaler.state_dict() for scaler in _scalers(trainer)]
    state["opt_param_scheduler"] = trainer.scheduler.state_dict()
    state["rng_state"] = ShardedObject(
        "rng_state", random_state(), (trainer.world_size,), (dist.get_rank(),)
    )
    return state


def random_state() -> dict[str, Any]:
    """This rank's generators: torch's own and those of Megatron's tracker."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {"torch": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
