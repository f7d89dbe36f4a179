"""Memory of a training program: what is alive, what backward keeps, where the peak is.

- `MemoryMeter` follows every storage from birth to death: live bytes at every operator, the peak
  with its moment, what is kept for backward, leaks.
- `saved_bytes` counts what passes through autograd's saved-tensor hooks: cheap, and an independent
  second opinion.
- `peak_bytes`, `reserved_bytes` ask the device's allocator, for the price of nothing.
"""

from ms_profile.memory.device import (
    peak_bytes,
    peak_resident_bytes,
    reserved_bytes,
    reset_peak_bytes,
)
from ms_profile.memory.meter import MemoryMeter
from ms_profile.memory.records import Holding, Mark, Peak, Snapshot
from ms_profile.memory.saved import SavedBytes, saved_bytes

__all__ = [
    "Holding",
    "Mark",
    "MemoryMeter",
    "Peak",
    "SavedBytes",
    "Snapshot",
    "peak_bytes",
    "peak_resident_bytes",
    "reserved_bytes",
    "reset_peak_bytes",
    "saved_bytes",
]
