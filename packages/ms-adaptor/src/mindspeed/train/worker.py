"""What one rank does: it takes commands from the launching process until told to finish."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mindspeed.train.config import TrainConfig
from mindspeed.train.messages import receive, send


@dataclass(frozen=True)
class RankJob:
    """Everything a rank needs; plain values, so that any start method can send it.

    Attributes:
        flat: the configuration, by leaf.
        rank: this rank.
        world_size: number of ranks.
        store: path of the rendezvous file.
        cache: folder of the indexed datasets.
        threads: threads a rank may use.
        load: checkpoint to start from.
        reshard: it may be cut anew.
    """

    flat: dict[str, Any]
    rank: int
    world_size: int
    store: str
    cache: str
    threads: int
    load: str | None
    reshard: bool


def rank_main(job: RankJob, connection: Connection) -> None:
    """Entry of a rank's process."""
    # A group of its own: an interrupt from the terminal goes to the launching process alone, and
    # that one can end this rank with everything the rank has started.
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        _serve(job, connection)
    except EOFError:
        os.killpg(0, signal.SIGKILL)  # the launching process is gone
    except BaseException as error:
        send(
            connection,
            "error",
            rank=job.rank,
            text=f"{type(error).__name__}: {error}",
            known=_is_for_users(error),
            trace=traceback.format_exc(),
        )
        connection.close()
        # A normal exit would wait for communication threads whose peers may never answer.
        os._exit(1)


def _is_for_users(error: BaseException) -> bool:
    """Whether the message says all that a user needs, without a traceback."""
    from mindspeed.patching.errors import PatchError, PlanError
    from mindspeed.train.level import LevelError
    from mindspeed.train.state import CheckpointError
    from mindspeed.train.text import TextError
    from mindspeed.train.tokenizer import TokenizerError
    from mindspeed.train.validate import ConfigError

    ours = (CheckpointError, ConfigError, LevelError, PatchError, PlanError, TextError)
    # Where nothing has imported it, nothing has raised it.
    memory = getattr(sys.modules.get("ms_memory.errors"), "MemoryFeatureError", TokenizerError)
    return isinstance(error, (*ours, TokenizerError, memory))


def _serve(job: RankJob, connection: Connection) -> None:
    from mindspeed.features.profile import determinism

    config = TrainConfig.from_flat(job.flat)
    # Around the process group, whose library reads its settings when it is made.
    with determinism.scope(config.plan_values()):
        _join(job, config, connection)


def _join(job: RankJob, config: TrainConfig, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    from mindspeed import device
    from mindspeed.train.data import prepare_datasets
    from mindspeed.train.trainer import Trainer

    torch.set_num_threads(job.threads)
    descriptor = device.install()
    if descriptor.type != "cpu":
        torch.accelerator.set_device_index(job.rank % torch.accelerator.device_count())
    dist.init_process_group(
        descriptor.backend,
        store=dist.FileStore(job.store, job.world_size),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=config.distributed_timeout),
    )
    train, valid = prepare_datasets(config, Path(job.cache))
    with Trainer(config, train, valid) as trainer:
        if job.load is not None:
            trainer.load(job.load, reshard=job.reshard)
        send(connection, "ready", rank=job.rank, step=trainer.step_count, device=descriptor.type)
        _obey(trainer, connection, job.rank)
    dist.destroy_process_group()
    send(connection, "done", rank=job.rank)


def _obey(trainer: Any, connection: Connection, rank: int) -> None:
    """Carries out commands; each is sent to all ranks, so collectives match."""
    start = trainer.step_count
    while True:
        command = receive(connection)
        kind = command["kind"]
        if kind == "run":
            _run(trainer, connection, rank, command["steps"], start)
        elif kind == "evaluate":
            loss = trainer.evaluate()
            if rank == 0:
                send(connection, "valid", step=trainer.step_count, loss=loss)
        elif kind == "save":
            path = trainer.save(command["folder"], asynchronous=command["asynchronous"])
            if rank == 0:
                send(connection, "saved", step=trainer.step_count, path=str(path))
        elif kind == "finish":
            return
        send(connection, "idle", rank=rank, after=kind)


def _run(trainer: Any, connection: Connection, rank: int, steps: int, start: int) -> None:
    for _ in range(steps):
        # The optimizer's states exist from the second step on: it is what all others are like.
        # The first two are not timed.
        measure = trainer.step_count == min(start + 1, trainer.config.train_iters - 1)
        # Rank 0 sees a command that arrives meanwhile; all ranks stop after the same step.
        result = trainer.train_step(stop=rank == 0 and connection.poll(), measure=measure)
        if trainer.step_count == start + 1:
            _tell_plan(trainer, connection)
        if rank == 0:
            send(connection, "step", **asdict(result))
        if result.stop:
            return


def _tell_plan(trainer: Any, connection: Connection) -> None:
    """Sends the memory plan of a pipeline stage, from its first rank."""
    made = trainer.memory_plan()
    if made is not None and made.first:
        send(connection, "memory", stage=made.stage, text=str(made), plan=made.plan.as_dict())
