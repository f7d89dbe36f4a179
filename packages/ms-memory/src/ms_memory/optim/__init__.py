"""Optimizer state in fewer bytes, or elsewhere: packed masters, streamed moments."""

from .adamw import PackedAdamW
from .packed import PackedMaster
from .streamed import Streamed

__all__ = ["PackedAdamW", "PackedMaster", "Streamed"]
