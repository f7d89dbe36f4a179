"""Traces of a window of training steps: torch.profiler and torch_npu.profiler behind one front.

    with profile(10, 12, cpu=True, out="profile_dir") as profiler:
        for iteration in range(1, 21):
            profiler.step(iteration)
            train()

writes the steps 10 and 11. `Schedule` decides alone and can be asked without a profiler.
"""

from __future__ import annotations

from ms_profile.profiler.api import profile
from ms_profile.profiler.schedule import Schedule
from ms_profile.profiler.step import StepProfiler

__all__ = ["Schedule", "StepProfiler", "profile"]
