"""Memory figures of a training step."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class StepMeter:
    """Bytes saved for backward and the highest memory of this rank.

    Args:
        chunks: the model, whose parameters and buffers are not counted.
        device: where the model lives.
        on: without it nothing is hooked and `saved_bytes` stays 0.
    """

    def __init__(self, chunks: list[nn.Module], device: torch.device, *, on: bool) -> None:
        self._chunks = chunks
        self._device = device
        self._on = on
        self.saved_bytes = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Meters the forward and backward passes run inside."""
        if not self._on:
            yield
            return
        from ms_profile.memory import saved_bytes

        with saved_bytes(exclude=self._chunks) as meter:
            yield
        self.saved_bytes = meter.peak

    def peak_bytes(self) -> int:
        """Highest device memory of this rank; of its whole process on a CPU."""
        if self._device.type == "cpu":
            return peak_resident_bytes()
        runtime = getattr(torch, self._device.type)
        return int(runtime.max_memory_allocated(self._device))


def peak_resident_bytes() -> int:
    """Highest resident memory that this process had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
