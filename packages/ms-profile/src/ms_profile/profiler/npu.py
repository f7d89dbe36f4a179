"""torch_npu.profiler: the only module of this package that names torch_npu."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch_npu.profiler as npu

from ms_profile.profiler.collection import Collection

__all__ = ["NpuBackend"]


class NpuBackend:
    """One window of torch_npu.profiler.

    It writes a folder `rank<R>_steps<A>-<B>_<process>_<time>_ascend_pt` as soon as the window is
    over. Its steps count from 0; `ms_profile` in the folder's metadata has the window.

    Args:
        collection: what to record.
        folder: where its folder goes.
        stem: how the name of its folder begins.
        facts: goes into the metadata.
    """

    name = "npu"

    def __init__(
        self, collection: Collection, folder: Path, stem: str, facts: dict[str, Any]
    ) -> None:
        self._collection = collection
        self._folder = folder
        self._stem = stem
        self._facts = facts
        self._before = set(self._folders())
        self._profile: Any = None
        self._steps_left = 0
        self._waiting = False

    @property
    def profiler(self) -> Any:
        """The profiler of torch_npu."""
        return self._profile

    def prepare(self, warmup: int, active: int) -> None:
        """Switch on. All warm-up iterations are one step of torch_npu."""
        self._profile = npu.profile(
            **settings(self._collection),
            schedule=npu.schedule(wait=0, warmup=min(warmup, 1), active=active, repeat=1),
            # Made before the start: it is what tells torch_npu where to write.
            on_trace_ready=npu.tensorboard_trace_handler(
                dir_name=str(self._folder),
                worker_name=self._stem,
                analyse_flag=self._collection.analyse != "later",
                async_mode=self._collection.analyse == "async",
            ),
        )
        self._waiting = warmup > 0
        self._steps_left = active
        self._profile.start()
        self._profile.add_metadata_json("ms_profile", json.dumps(self._facts))

    def begin(self, iteration: int) -> None:
        """Go on to the next step, out of the warm-up or out of the step before."""
        if self._waiting:
            self._profile.step()
        self._waiting = True

    def end(self, iteration: int) -> None:
        """The step goes on until the next one begins; the last one ends with the window."""
        self._steps_left -= 1

    def stop(self) -> None:
        """Stop, and write what was recorded."""
        if self._steps_left == 0:
            # Out of the last planned step: torch_npu saves without complaint.
            self._profile.step()
        self._profile.stop()

    def export(self, folder: Path, stem: str) -> Sequence[Path]:
        """What torch_npu has written."""
        return sorted(set(self._folders()) - self._before)

    def operators(self) -> list[dict[str, Any]]:
        """Not known: they are in ASCEND_PROFILER_OUTPUT of the written folder."""
        return []

    def abandon(self) -> None:
        """Stop without a word."""
        if self._profile is not None:
            self._profile.stop()

    def _folders(self) -> list[Path]:
        return list(self._folder.glob(f"{self._stem}_*_ascend_pt"))


def settings(collection: Collection) -> dict[str, Any]:
    """Arguments of torch_npu's `profile` for what is to be recorded."""
    activity = npu.ProfilerActivity
    wanted = [activity.NPU] if collection.device else []
    metrics = npu.AiCMetrics
    return {
        "activities": [*wanted, activity.CPU] if collection.cpu else wanted,
        "record_shapes": collection.shapes,
        "profile_memory": collection.memory,
        "with_stack": collection.stack,
        "experimental_config": npu._ExperimentalConfig(
            profiler_level=getattr(npu.ProfilerLevel, f"Level{collection.level}"),
            # Level 0 has none; torch_npu warns when it is asked all the same.
            aic_metrics=metrics.PipeUtilization if collection.level else metrics.AiCoreNone,
            l2_cache=False,
        ),
    }
