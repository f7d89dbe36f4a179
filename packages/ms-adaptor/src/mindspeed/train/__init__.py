"""Training a GPT through megatron-core: a library (`Trainer`) and a command (`mindspeed train`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed.train.config import TrainConfig
    from mindspeed.train.state import CheckpointError
    from mindspeed.train.trainer import StepResult, Trainer
    from mindspeed.train.validate import ConfigError

__all__ = ["CheckpointError", "ConfigError", "StepResult", "TrainConfig", "Trainer"]

_HOME = {
    "CheckpointError": "mindspeed.train.state",
    "ConfigError": "mindspeed.train.validate",
    "StepResult": "mindspeed.train.trainer",
    "TrainConfig": "mindspeed.train.config",
    "Trainer": "mindspeed.train.trainer",
}


def __getattr__(name: str) -> Any:
    # Reading the configuration must not cost an import of torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
