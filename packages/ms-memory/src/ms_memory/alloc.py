"""The device's allocator: what it holds without use, and what to set against that.

Allocators are torch's and torch_npu's; none is replaced here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Share of the reserved bytes that may lie idle before it is worth a setting.
IDLE = 0.1
_VARIABLES = {"cuda": "PYTORCH_CUDA_ALLOC_CONF", "npu": "PYTORCH_NPU_ALLOC_CONF"}


@dataclass(frozen=True)
class AllocatorStats:
    """What a device's allocator counted.

    Attributes:
        kind: device type.
        allocated: most bytes that tensors took at once.
        reserved: most bytes that it held for them at once.
        retries: how often it gave back what it held and asked the device again.
    """

    kind: str
    allocated: int
    reserved: int
    retries: int


def read(kind: str = "auto", api: Any = None) -> AllocatorStats | None:
    """Return what the allocator of this process counted so far, None on the processor.

    Args:
        kind: device type; "auto": the machine's accelerator.
        api: the device's module of torch; None: found by its type.
    """
    kind, api = _module(kind, api)
    if api is None:
        return None
    retries = api.memory_stats().get("num_alloc_retries", 0)
    return AllocatorStats(kind, api.max_memory_allocated(), api.max_memory_reserved(), retries)


def recommend(stats: AllocatorStats | None) -> str:
    """Say whether memory is fragmented, and what to put into the environment if it is.

    Args:
        stats: of `read`, after some steps.
    """
    if stats is None:
        return "the processor's memory has no such allocator: nothing to set"
    idle = stats.reserved - stats.allocated
    found = (
        f"the {stats.kind} allocator held {stats.reserved} bytes for tensors of {stats.allocated},"
        f" {idle} idle, with {stats.retries} retries"
    )
    if idle <= IDLE * stats.reserved and not stats.retries:
        return f"{found}: nothing to set"
    variable = _VARIABLES.get(stats.kind, "PYTORCH_ALLOC_CONF")
    return f"{found}: start with {variable}=expandable_segments:True in the environment"


@contextlib.contextmanager
def pool(kind: str = "auto", api: Any = None) -> Iterator[Any]:
    """Give what is made inside its own memory, apart from what comes and goes in steps.

    For the model and the optimizer's state. Yields the pool, to be kept as long as they are, or
    None where the device has no pools, as the processor.

    Args:
        kind: device type; "auto": the machine's accelerator.
        api: the device's module of torch; None: found by its type.
    """
    _, api = _module(kind, api)
    if not hasattr(api, "MemPool"):
        yield None
        return
    made = api.MemPool()
    with api.use_mem_pool(made):
        yield made


def _module(kind: str, api: Any) -> tuple[str, Any]:
    if kind == "auto":
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if here is None else here.type
    if kind == "cpu" or api is not None:
        return kind, api
    return kind, torch.get_device_module(kind)
