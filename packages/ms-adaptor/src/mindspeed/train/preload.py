"""Imported by the fork server, so that ranks start with torch and Megatron already loaded.

Anywhere else, importing this module does nothing: the launching process says so by an environment
variable, which it sets only for the fork server.
"""

from __future__ import annotations

import importlib
import os

PRELOAD_VARIABLE = "MINDSPEED_TRAIN_PRELOAD"

MODULES = (
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "mindspeed.patching.apply",
    "mindspeed.train.data",
    "mindspeed.train.model",
    "mindspeed.train.trainer",
    "ms_profile.memory",
)


def load() -> None:
    """Installs the device layer and imports what every rank needs; starts no thread."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import mindspeed
    from mindspeed import device

    device.install()
    for name in MODULES:
        importlib.import_module(name)
    # Reads and parses Megatron's sources once, for all ranks.
    mindspeed.plan(level=0)


if os.environ.get(PRELOAD_VARIABLE) == "1":
    load()
