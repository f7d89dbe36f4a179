"""The one line that a Megatron script adds: ``import mindspeed.megatron_adaptor``.

Importing installs the device layer and applies the level-0 plan; patches of modules that are not
imported yet wait for their import. Nothing is parsed here: flags are added when Megatron builds its
parser, and features are activated from the arguments that Megatron has validated. Code that
builds its configuration in another way calls :func:`mindspeed.activate`.

Raises:
    RuntimeError: on a CPU or NPU, when Megatron was imported before.
    mindspeed.PlanError: the installed Megatron is not supported; lists what differs.
"""

from __future__ import annotations

import mindspeed
from mindspeed import device, processes

descriptor = device.install()
handle = mindspeed.activate(None, level=0)
processes.propagate()
