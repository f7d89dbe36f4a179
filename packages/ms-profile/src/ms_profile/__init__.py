"""Meters for PyTorch training."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; imported on first use.
_PUBLIC = {
    "CommMeter": "ms_profile.comm",
    "EventTrace": "ms_profile.events",
    "FlopMeter": "ms_profile.flops",
    "MemoryMeter": "ms_profile.memory",
    "Meter": "ms_profile.tap",
    "Schedule": "ms_profile.profiler",
    "StepProfiler": "ms_profile.profiler",
    "VirtualClock": "ms_profile.clock",
    "deterministic": "ms_profile.determinism",
    "peak_flops": "ms_profile.flops",
    "profile": "ms_profile.profiler",
    "register_flops": "ms_profile.flops",
    "saved_bytes": "ms_profile.memory",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
