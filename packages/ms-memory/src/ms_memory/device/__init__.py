"""Devices that tensors can leave for the host: GPUs, NPUs, and a simulated one for tests."""

from __future__ import annotations

import os

import torch

from .accelerator import Accelerator
from .clock import VirtualClock
from .host import Cpu
from .protocol import Device, DeviceStats, Event, Stream
from .sim import Schedule, Sim, SimOutOfMemoryError, sim

__all__ = [
    "SIM",
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
    "device_of",
    "npu",
    "resolve",
    "sim",
]

# Names a simulated device to stand for the processor.
SIM = "MS_MEMORY_SIM"
_SCHEDULES: dict[str, Schedule] = {"early": "early", "late": "late"}


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
        device: "auto" for the machine's accelerator, or where there is none the processor, or
            what `MS_MEMORY_SIM` puts in its place; a device type; or a device, which is returned.

    Raises:
        ValueError: a type that torch has no module for; "auto" and an unreadable `MS_MEMORY_SIM`.
    """
    if not isinstance(device, str | torch.device):
        return device
    if device == "auto":
        return device_of(torch.device(_here()))
    try:
        kind = torch.device(device).type
        return cpu() if kind == "cpu" else Accelerator(kind)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, need one that torch has a module for") from error


def device_of(where: torch.device) -> Device:
    """Return the device of tensors that nobody named one for.

    Args:
        where: they are. On the processor `MS_MEMORY_SIM` may name a simulated device instead:
            `early`, `late` or a seed, and after a colon the bytes that it has, as in `late:65536`.

    Raises:
        ValueError: the variable has another form.
    """
    given = os.environ.get(SIM, "")
    if where.type != "cpu" or not given:
        return resolve(where)
    first, colon, nbytes = given.partition(":")
    schedule = _SCHEDULES.get(first, _number(first))
    capacity = _number(nbytes)
    if schedule is None or bool(colon) != (capacity is not None):
        need = "early, late or a seed, then perhaps a colon and a number of bytes"
        raise ValueError(f"{SIM}: got {given!r}, need {need}")
    return sim(capacity, schedule)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _here() -> str:
    # Asked first, a machine without accelerator is no error, and no device starts.
    available = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if available else None
    return "cpu" if found is None else found.type
