"""Devices that tensors can leave for the host: GPUs, NPUs, and a simulated one for tests."""

from __future__ import annotations

import torch

from .accelerator import Accelerator
from .clock import VirtualClock
from .host import Cpu
from .protocol import Device, DeviceStats, Event, Stream
from .sim import Sim, SimOutOfMemoryError, sim

__all__ = [
    "Accelerator",
    "Cpu",
    "Device",
    "DeviceStats",
    "Event",
    "Sim",
    "SimOutOfMemoryError",
    "Stream",
    "VirtualClock",
    "cpu",
    "cuda",
    "npu",
    "resolve",
    "sim",
]


def cpu() -> Cpu:
    """Return the processor, which refuses to copy."""
    return Cpu()


def cuda() -> Accelerator:
    """Return the current GPU."""
    return Accelerator("cuda")


def npu() -> Accelerator:
    """Return the current NPU."""
    return Accelerator("npu")


def resolve(device: str | torch.device | Device = "auto") -> Device:
    """Return a device by name.

    Args:
        device: "auto" for the machine's accelerator, or the processor where there is none; a
            device type; or a device, which is returned.

    Raises:
        ValueError: a type that torch has no module for.
    """
    if not isinstance(device, str | torch.device):
        return device
    try:
        kind = _here() if device == "auto" else torch.device(device).type
        return cpu() if kind == "cpu" else Accelerator(kind)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, need one that torch has a module for") from error


def _here() -> str:
    # Asked first, a machine without accelerator is no error, and no device starts.
    available = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if available else None
    return "cpu" if found is None else found.type
