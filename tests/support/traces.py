"""Traces as torch.profiler writes them on a GPU, with times chosen so that sums are plain."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
STEPS = (10, 11)


def gpu_trace(rank: int = 0, world_size: int = 2, steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
    """Two steps: three kernels each, an all-reduce that overlaps the last one, a copy.

    In microseconds, both steps together: compute 600 + 60 * rank, communication 200, of which
    exposed 90 - 20 * rank, copies 20 (exposed), window 921.
    """
    events: list[dict[str, Any]] = []
    at, number = 1000, 1
    for step in steps:
        begin = at
        for _ in range(3):
            events += _launch(number, at, "sgemm_128", at + 15, 100 + 10 * rank)
            at, number = at + 120, number + 1
        events += _launch(number, at - 80, NCCL, at - 60, 100, _record(world_size), stream=20)
        events += _launch(
            number + 1, at + 50, "Memcpy DtoH", at + 60, 10, {"bytes": 4}, "gpu_memcpy"
        )
        at, number = at + 100, number + 2
        events.append(_event("user_annotation", f"ProfilerStep#{step}", begin - 2, at - begin + 1))
    distributed = {"backend": "nccl", "rank": rank, "world_size": world_size}
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "GPU"}],
        "distributedInfo": distributed,
        "traceEvents": events,
    }


def _record(world_size: int) -> dict[str, Any]:
    return {
        "Collective name": "allreduce",
        "In msg nelems": 1024,
        "Out msg nelems": 1024,
        "Group size": world_size,
        "dtype": "Float",
        "Process Group Name": "1",
        "Process Group Description": "dp",
        "Process Group Ranks": str(list(range(world_size))),
    }


def _launch(
    number: int,
    at: int,
    name: str,
    begin: int,
    duration: int,
    args: dict[str, Any] | None = None,
    category: str = "kernel",
    stream: int = 7,
) -> list[dict[str, Any]]:
    """An operator, the runtime call in it, and what that starts on the device."""
    shared = {"External id": number, "correlation": number}
    device = {**shared, "device": 0, "stream": stream, "context": 1, **(args or {})}
    operator = "aten::mm" if category == "kernel" and stream == 7 else "aten::to"
    return [
        _event("cpu_op", operator, at, 20, {"External id": number}),
        _event("cuda_runtime", "cudaLaunchKernel", at + 5, 5, {**shared, "cbid": 211}),
        {**_event(category, name, begin, duration, device), "pid": 0, "tid": stream},
    ]


def _event(
    category: str, name: str, ts: float, dur: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    place = {"pid": 10, "tid": 10, "ts": ts, "dur": dur}
    return {"ph": "X", "cat": category, "name": name, **place, "args": args or {}}


def host_event(name: str, ts: float, dur: float, tid: int = 10, category: str = "cpu_op") -> Any:
    """An event of a thread of the host."""
    return {**_event(category, name, ts, dur), "tid": tid}


def write_trace(path: Path, trace: Any) -> Path:
    """Writes a trace, packed if the name says so."""
    content = json.dumps(trace).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def comm_record(rank: int, world: int = 2) -> dict[str, Any]:
    """Three all-reduces of 16 bytes, as a communication meter records them."""
    peers = {str(r): 8 for r in range(world) if r != rank}
    call = {
        "index": 0,
        "op": "all_reduce",
        "group": "dp",
        "bytes": 16,
        "wire_bytes": 8,
        "to": peers,
    }
    return {"kind": "comm", "version": 1, "rank": rank, "world_size": world, "calls": [call] * 3}


def memory_record(rank: int = 0) -> dict[str, Any]:
    """Three moments with a peak of 96 bytes, as a memory meter records them."""
    peak = {"bytes": 96, "module": "mlp", "phase": "forward", "op": "aten.mm", "index": 1}
    timeline = [[0, 0.0, 32], [1, 0.5, 96], [2, 1.0, 0]]
    return {"kind": "memory", "version": 1, "rank": rank, "peak": peak, "timeline": timeline}


def flops_record() -> dict[str, Any]:
    """301 operations, as a FLOP meter records them."""
    by_module = {"mlp": {"forward": 100, "backward": 200}, "": {"forward": 1}}
    total = {"forward": 101, "backward": 200, "recompute": 0}
    return {"kind": "flops", "version": 1, "total": total, "by_module": by_module, "by_op": {}}
