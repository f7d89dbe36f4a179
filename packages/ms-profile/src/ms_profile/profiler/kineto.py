"""torch.profiler, for CPU and for every accelerator that it knows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from ms_profile.files import adopt, free_number, workspace
from ms_profile.profiler.collection import Collection, has_accelerator
from ms_profile.profiler.labels import GroupLabels

__all__ = ["KinetoBackend"]

_log = logging.getLogger("ms_profile")


class KinetoBackend:
    """One window of torch.profiler.

    Args:
        collection: what to record.
        rank: this rank, for the trace's metadata where no process group says it.
        world_size: number of ranks.
        facts: goes into the trace's metadata.
    """

    name = "torch"

    def __init__(
        self, collection: Collection, rank: int, world_size: int, facts: dict[str, Any]
    ) -> None:
        self._facts = facts
        self._place = {"rank": rank, "world_size": world_size}
        self._labels = collection.level > 0 and _has_gloo() and GroupLabels.is_usable()
        self._scope = ExitStack()
        self._mark: AbstractContextManager[Any] | None = None
        self._prepared = False
        self._started = False
        self._profile = torch.profiler.profile(
            activities=activities(collection),
            record_shapes=collection.shapes,
            profile_memory=collection.memory,
            with_stack=collection.stack,
        )
        if collection.level and not self._labels:
            _log.warning("level=%d: torch.profiler records nothing more here", collection.level)

    @property
    def profiler(self) -> torch.profiler.profile:
        """The profiler of torch."""
        return self._profile

    def prepare(self, warmup: int, active: int) -> None:
        """Allocate buffers and load the tracing library, without recording."""
        if torch._C._autograd._profiler_enabled():
            # A second one would end the first and take its events away.
            raise RuntimeError("another profiler of torch is on")
        self._profile.prepare_trace()
        self._prepared = True

    def begin(self, iteration: int) -> None:
        """Start recording with the first iteration, and mark each one for the viewers."""
        if not self._started:
            self._profile.start_trace()
            self._started = True
            if not (dist.is_available() and dist.is_initialized()):
                self._profile.add_metadata_json("distributedInfo", json.dumps(self._place))
            self._profile.add_metadata_json("ms_profile", json.dumps(self._facts))
        # The name by which TensorBoard and HolisticTraceAnalysis know the steps.
        self._mark = record_function(f"ProfilerStep#{iteration}")
        self._mark.__enter__()
        if self._labels:
            self._scope.enter_context(GroupLabels())

    def end(self, iteration: int) -> None:
        """Close the mark of the iteration."""
        self._scope.close()
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def stop(self) -> None:
        """Stop recording; on a device this waits for what it still runs."""
        self._stop_trace()

    def _stop_trace(self) -> None:
        self._prepared = self._started = False
        if not torch._C._autograd._profiler_enabled():
            # Reading what is no more there would end the process.
            raise RuntimeError("another profiler of torch was switched on, which ended this one")
        self._profile.stop_trace()

    def export(self, folder: Path, stem: str) -> Sequence[Path]:
        """Write one Chrome trace, complete or not at all."""
        name = f"{stem}.pt.trace.json"
        number = free_number(folder, name, f"{stem}.summary.json")
        with workspace(folder) as place:
            unfinished = place / "trace.json"
            self._profile.export_chrome_trace(str(unfinished))
            return [adopt(unfinished, folder, name, number)]

    def operators(self) -> list[dict[str, Any]]:
        """torch's own averages by operator, and by input shapes where they were recorded."""
        averages = self._profile.key_averages(group_by_input_shape=self._profile.record_shapes)
        rows = [_row(each) for each in averages]
        return sorted(rows, key=lambda row: -max(row["self_us"], row["device_self_us"]))

    def abandon(self) -> None:
        """Leave no mark and no recording behind."""
        try:
            self.end(0)
        finally:
            if self._prepared:
                if not self._started:
                    # What the preparation holds is given up by a stop, which needs a start.
                    self._profile.start_trace()
                self._stop_trace()


def activities(collection: Collection) -> list[ProfilerActivity]:
    """What torch.profiler is asked for; where nothing but a CPU is, the CPU is the device."""
    supported = set(torch.profiler.supported_activities())
    devices = supported - {ProfilerActivity.CPU}
    found = devices if collection.device and has_accelerator() else set()
    if collection.cpu or not found:
        found = {ProfilerActivity.CPU, *found}
    return sorted(found, key=str)


def _has_gloo() -> bool:
    joined = dist.is_available() and dist.is_initialized()
    return joined and "gloo" in str(dist.get_backend_config())


def _row(event: Any) -> dict[str, Any]:
    # Rows of kernels have a device; times of the host are microseconds too.
    row = {
        "name": event.key,
        "calls": event.count,
        "self_us": event.self_cpu_time_total,
        "total_us": event.cpu_time_total,
        "device_self_us": getattr(event, "self_device_time_total", 0),
        "device_total_us": getattr(event, "device_time_total", 0),
        "self_bytes": event.self_cpu_memory_usage,
        "device_self_bytes": getattr(event, "self_device_memory_usage", 0),
        "mark": bool(getattr(event, "is_user_annotation", False)),
        "async": bool(event.is_async),
    }
    if event.input_shapes:
        row["shapes"] = event.input_shapes
    return row
