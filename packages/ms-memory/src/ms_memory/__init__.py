"""Memory of a training step: what is kept, recomputed, swapped or packed."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it; imported on first use.
_PUBLIC: dict[str, str] = {
    "DeferredCheckpoint": "ms_memory.recompute",
    "Discard": "ms_memory.recompute",
    "HostLedger": "ms_memory.ledger",
    "MemoryFeatureError": "ms_memory.errors",
    "PackedAdamW": "ms_memory.optim",
    "PackedMaster": "ms_memory.optim",
    "SavedLedger": "ms_memory.ledger",
    "Session": "ms_memory.session",
    "StorageCensus": "ms_memory.ledger",
    "Streamed": "ms_memory.optim",
    "Timeline": "ms_memory.ledger",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
