"""Optimizer state in fewer bytes, or elsewhere: packed masters, streamed moments."""

from .adamw import PackedAdamW
from .packed import PackedMaster

__all__ = ["PackedAdamW", "PackedMaster"]
