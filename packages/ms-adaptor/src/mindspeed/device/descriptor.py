"""Which device Megatron runs on, and how that is found out."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, cast

DeviceType = Literal["cpu", "npu", "cuda"]
BACKENDS: dict[str, str] = {"cpu": "gloo", "npu": "hccl", "cuda": "nccl"}
ENV = "MS_DEVICE"


@dataclass(frozen=True)
class Descriptor:
    """The device that Megatron's ``cuda`` means.

    Attributes:
        type: torch device type.
        backend: default ``torch.distributed`` backend of that device.
        pin: whether host memory may be pinned for it.
        because: how the type was chosen, for reports.
    """

    type: DeviceType
    backend: str
    pin: bool
    because: str


def describe(type: str | None = None) -> Descriptor:
    """Choose the device: argument, then ``MS_DEVICE``, then npu, cuda, cpu by presence.

    Raises:
        ValueError: the name is not ``cpu``, ``npu`` or ``cuda``.
        RuntimeError: ``npu`` is asked for and torch_npu cannot be imported.
    """
    name, because = _choose(type)
    if name not in BACKENDS:
        raise ValueError(
            f"device type: got {name!r} (from {because}), need one of {', '.join(BACKENDS)}"
        )
    if name == "npu":
        _import_torch_npu()
    return Descriptor(cast(DeviceType, name), BACKENDS[name], pin=name != "cpu", because=because)


def _choose(type: str | None) -> tuple[str, str]:
    if type is not None:
        return type, "the argument"
    if os.environ.get(ENV):
        return os.environ[ENV], f"the environment variable {ENV}"
    import torch

    problem = npu_problem()
    if problem is None:
        return "npu", "torch_npu is installed and sees a device"
    if torch.cuda.is_available():
        return "cuda", "torch.cuda is available"
    return "cpu", f"no accelerator: {problem}; torch.cuda is not available"


def npu_problem() -> str | None:
    """Why no NPU can be used here; None when one can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        _import_torch_npu()
    except RuntimeError as error:
        return str(error)
    import torch

    npu = getattr(torch, "npu")  # noqa: B009 -- torch_npu adds it
    return None if npu.is_available() else "torch_npu sees no device"


def _import_torch_npu() -> None:
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a missing CANN shows as ImportError, OSError or RuntimeError
        raise RuntimeError(f"torch_npu cannot be imported: {error}") from error
