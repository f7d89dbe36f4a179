"""Memory figures of the process and of the device's allocator; they cost nothing while it runs."""

from __future__ import annotations

import sys

import torch

__all__ = ["peak_bytes", "peak_resident_bytes", "reserved_bytes", "reset_peak_bytes"]


def peak_bytes(device: torch.device | str) -> int:
    """Highest device memory that tensors of this process had; of the whole process on a CPU.

    Args:
        device: a CPU, or an accelerator whose `torch.<type>` module has `max_memory_allocated`
            (CUDA, NPU, XPU).

    Raises:
        ValueError: the device keeps no such number.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return peak_resident_bytes()
    return int(_runtime(device, "max_memory_allocated")(device))


def reserved_bytes(device: torch.device | str) -> int:
    """Highest memory that the device's allocator took from the driver: rounding and holes included.

    Raises:
        ValueError: the device keeps no such number; a CPU does not.
    """
    device = torch.device(device)
    return int(_runtime(device, "max_memory_reserved")(device))


def reset_peak_bytes(device: torch.device | str) -> bool:
    """Starts the device's peak anew; returns False on a CPU, where the system allows no such thing.

    Raises:
        ValueError: the device keeps no such number.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return False
    _runtime(device, "reset_peak_memory_stats")(device)
    return True


def peak_resident_bytes() -> int:
    """Highest resident memory that this process had.

    Raises:
        ValueError: the system does not tell (Windows).
    """
    try:
        import resource
    except ImportError:
        raise ValueError("this system does not report a process's highest memory") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _runtime(device: torch.device, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    function = getattr(getattr(torch, device.type, None), name, None)
    if function is None:
        raise ValueError(f"torch.{device.type} has no {name}: {device} keeps no such number")
    return function
