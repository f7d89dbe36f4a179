"""The function that most programs need."""

from __future__ import annotations

import os

from ms_profile.profiler.collection import Analyse, Collection
from ms_profile.profiler.ranks import Ranks
from ms_profile.profiler.schedule import Compat, Schedule
from ms_profile.profiler.step import Ready, StepProfiler

__all__ = ["profile"]


def profile(
    start: int,
    stop: int,
    *,
    ranks: Ranks = "all",
    rank: int | None = None,
    world_size: int | None = None,
    backend: str = "auto",
    level: int = 0,
    cpu: bool = True,
    device: bool = True,
    memory: bool = False,
    stack: bool = False,
    shapes: bool = False,
    warmup: int = 1,
    out: str | os.PathLike[str] = "./profile_dir",
    on_ready: Ready = "trace",
    analyse: Analyse = "now",
    compat: Compat = "megatron",
) -> StepProfiler:
    """A profiler of the iterations `[start, stop)`.

    Args:
        start: first traced iteration; iterations count from 1 over the whole job.
        stop: the iteration after the last traced one.
        ranks: which ranks are traced: "all", global ranks (-1 means all), or a function of the
            rank. The others write nothing.
        rank: this rank; by default the one of the default process group, else 0.
        world_size: number of ranks, likewise.
        backend: "torch", "npu", "none" for nothing, or "auto": the NPU's where one is present.
        level: see `Collection`; so are the five that follow.
        cpu: record operators on the host.
        device: record kernels on the accelerator.
        memory: record allocations.
        stack: record Python call stacks.
        shapes: record sizes of inputs.
        warmup: iterations before the window in which the profiler warms up.
        out: folder for the files; it is made, with mode 0750, if it is not there.
        on_ready: "trace" writes a Chrome trace (torch) or torch_npu's folder; a function gets the
            library's profiler object instead, as `torch.profiler` does with `on_trace_ready`.
        analyse: see `Collection`.
        compat: what `start` and `stop` count; see `Schedule`.

    Returns:
        The profiler: a context manager whose `step(iteration)` the loop calls.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a value is out of range, arguments contradict each other, the backend is not
            there, or nothing can be written to `out`. No later error reaches the loop.
    """
    return StepProfiler(
        Schedule(start, stop, warmup, compat),
        Collection(level, cpu, device, memory, stack, shapes, analyse),
        ranks=ranks,
        rank=rank,
        world_size=world_size,
        backend=backend,
        out=out,
        on_ready=on_ready,
    )
