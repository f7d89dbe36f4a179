"""Imported by the fork server of `preload="megatron"`: the device layer, then Megatron's core."""

import mindspeed
import mindspeed.device

mindspeed.device.install("cpu")

import megatron.core  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402
import megatron.core.tensor_parallel  # noqa: E402,F401

# What a training rank would import otherwise.
import mindspeed.patching.apply  # noqa: E402
import mindspeed.train.initial  # noqa: E402
import mindspeed.train.optim  # noqa: E402
import mindspeed.train.trainer  # noqa: E402

# Reads and parses Megatron's sources once, for all ranks.
for level in (0, 1, 2):
    mindspeed.plan(level=level)
mindspeed.plan({"context_parallel_size": 2}, level=2)
