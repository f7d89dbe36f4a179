"""Reading and judging a checkpoint folder without Megatron, before any process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed.train.config import TrainConfig, section_of_leaf
from mindspeed.train.validate import flag

STATE_FILE = "train_state.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
_REQUIRED_FILES = (STATE_FILE, "metadata.json", "common.pt", ".metadata")
_REQUIRED_KEYS = ("step", "world_size", "config", "optimizer")

# What decides the meaning of the stored tensors; it cannot change at all.
_MODEL = {name for name, section in section_of_leaf().items() if section in ("model", "moe")}
_FIXED = (_MODEL - {"attention_dropout", "hidden_dropout", "init_method_std"}) | {"optimizer"}
# What may only change when the stored tensors are cut anew.
_LAYOUT = {
    name
    for name, section in section_of_leaf().items()
    if section == "parallel" and name.endswith("parallel_size")
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, unreadable or made for another job."""


def latest_step(folder: Path) -> int | None:
    """The newest complete step below `folder`, or None."""
    try:
        return int((folder / TRACKER_FILE).read_text())
    except (OSError, ValueError):
        return None


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint that `folder` is or whose newest one it holds.

    Raises:
        CheckpointError: neither.
    """
    if (folder / STATE_FILE).is_file():
        return folder
    step = latest_step(folder)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {folder}: neither {STATE_FILE} nor {TRACKER_FILE} is there"
        )
    return folder / f"iter_{step:07d}"


def read_state(path: Path) -> dict[str, Any]:
    """The record of one checkpoint, after looking that its files are there.

    Raises:
        CheckpointError: a file is missing, empty or not what it should be.
    """
    for name in _REQUIRED_FILES:
        file = path / name
        if not file.is_file() or file.stat().st_size == 0:
            raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing or empty")
    if not any(file.stat().st_size for file in path.glob("*.distcp")):
        raise CheckpointError(f"checkpoint {path} is incomplete: no tensor file (*.distcp)")
    try:
        record = json.loads((path / STATE_FILE).read_text())
        missing = [key for key in _REQUIRED_KEYS if key not in record]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {STATE_FILE} not readable: {error}") from error
    if missing:
        raise CheckpointError(f"checkpoint {path}: {STATE_FILE} lacks {', '.join(missing)}")
    return dict(record)


def compare(record: dict[str, Any], config: TrainConfig, world_size: int, *, reshard: bool) -> None:
    """Raises if the checkpoint does not fit the job.

    Raises:
        CheckpointError: names each difference and what to do.
    """
    stored, wanted = record["config"], config.flat()
    different = [name for name in sorted(_FIXED) if _differs(stored, wanted, name)]
    if different:
        raise CheckpointError(
            "the checkpoint belongs to another model: "
            + "; ".join(f"{flag(n)} is {stored.get(n)} there, {wanted[n]} here" for n in different)
        )
    moved = [
        f"{flag(name)} {stored.get(name)} -> {wanted[name]}"
        for name in sorted(_LAYOUT)
        if _differs(stored, wanted, name)
    ]
    if record["world_size"] != world_size:
        moved.insert(0, f"processes {record['world_size']} -> {world_size}")
    if moved and not reshard:
        raise CheckpointError(
            f"the checkpoint was cut for another layout ({', '.join(moved)}): "
            "start with the old sizes, or add --reshard to cut it anew"
        )


def _differs(stored: dict[str, Any], wanted: dict[str, Any], name: str) -> bool:
    mine = wanted[name]
    mine = list(mine) if isinstance(mine, tuple) else mine
    return bool(stored.get(name) != mine)
