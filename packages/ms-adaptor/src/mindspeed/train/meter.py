"""Memory figures of one rank."""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Highest device memory of this rank so far; of its whole process on a CPU."""
    if device.type == "cpu":
        return peak_resident_bytes()
    runtime = getattr(torch, device.type)
    return int(runtime.max_memory_allocated(device))


def peak_resident_bytes() -> int:
    """Highest resident memory that this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
