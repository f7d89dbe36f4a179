"""The folder of a run: where it lies, what is in it, and what a resumed one goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mindspeed.train.args import LATEST, Options, UsageError
from mindspeed.train.config import TrainConfig
from mindspeed.train.state import (
    CheckpointError,
    checkpoint_folder,
    compare,
    latest_step,
    read_state,
)

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "losses.png"
MEMORY_PLAN = "memory"
_TEXT_KEY = "text_key"
_TEXT_OPTIONS = {"data", "tokenizer", "split", "seq_length"}


@dataclass(frozen=True)
class RunPlan:
    """What will happen, decided before anything is written or started.

    Attributes:
        config: the configuration, stored values of a resumed run included.
        folder: the run's folder.
        cache: folder of indexed datasets, shared by all runs.
        load: checkpoint to start from.
        start: step of that checkpoint, else 0.
        save: folder for checkpoints, or None.
        text: key of the text's content.
    """

    config: TrainConfig
    folder: Path
    cache: Path
    load: Path | None
    start: int
    save: Path | None
    text: str = ""


def plan_run(options: Options) -> RunPlan:
    """Decides folders and the checkpoint, and checks them; writes nothing.

    Raises:
        UsageError: the run's name is taken.
        CheckpointError: the checkpoint does not fit, or is in the way.
    """
    cache = options.runs / ".data"
    if options.resume is not None:
        return _resumed(options, cache)
    folder = options.runs / (options.name or time.strftime("%Y%m%d-%H%M%S"))
    if folder.exists():
        raise UsageError(f"run {folder} exists: choose another --name, or --resume {folder}")
    save = None
    if options.save is not None:
        save = Path(options.save) if options.save else folder / CHECKPOINTS
        if (step := latest_step(save)) is not None:
            raise CheckpointError(
                f"{save} holds a checkpoint of step {step}: "
                f"go on with --resume {save}, or save elsewhere"
            )
    return RunPlan(options.config, folder, cache, None, 0, save)


def _resumed(options: Options, cache: Path) -> RunPlan:
    root = options.runs / LATEST if options.resume == LATEST else Path(str(options.resume))
    if not root.exists():
        hint = "no run yet: start one with --save" if options.resume == LATEST else "no such folder"
        raise CheckpointError(f"--resume {root}: {hint}")
    root = root.resolve()
    held = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    load = checkpoint_folder(held)
    record = read_state(load)
    stored = TrainConfig.from_flat(record["config"])
    features = {**dict(stored.feature_flags), **dict(options.config.feature_flags)}
    config = stored.replace(
        **{name: options.config.flat()[name] for name in options.given},
        feature_flags=tuple(sorted(features.items())),
    )
    compare(record, config, options.nproc, reshard=options.reshard)
    start = int(record["step"])
    if start >= config.train_iters:
        raise CheckpointError(
            f"{load} has reached step {start} of {config.train_iters}: "
            "give a larger --train-iters to go on"
        )
    home = held.parent if held.name == CHECKPOINTS else None
    if options.name is not None or home is None:
        folder = options.runs / (options.name or time.strftime("%Y%m%d-%H%M%S"))
        if folder.exists():
            raise UsageError(f"run {folder} exists: choose another --name")
    else:
        folder = home
    save = Path(options.save) if options.save else load.parent
    return RunPlan(config, folder, cache, load, start, save)


def check_text(plan: RunPlan, given: Collection[str]) -> None:
    """Raises if a resumed run would silently read other text than before.

    Args:
        plan: of a run whose folder may hold an earlier record.
        given: options of the command line; naming a text is consent to another one.

    Raises:
        CheckpointError: the text has changed and no option says so.
    """
    record = plan.folder / CONFIG_FILE
    if plan.load is None or not record.is_file() or _TEXT_OPTIONS & set(given):
        return
    before = json.loads(record.read_text()).get(_TEXT_KEY)
    if before not in (None, plan.text):
        raise CheckpointError(
            f"the text has changed since {plan.folder} began: put the old text back, "
            "or name the new one with --data"
        )


def create(plan: RunPlan) -> None:
    """Makes the run's folder and points `latest` at it."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    record = {**plan.config.flat(), _TEXT_KEY: plan.text}
    (plan.folder / CONFIG_FILE).write_text(json.dumps(record, indent=1) + "\n")
    runs = plan.folder.parent
    link, fresh = runs / LATEST, runs / f".{LATEST}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(plan.folder.name, target_is_directory=True)
    os.replace(fresh, link)
