"""What a step needs: bytes by the allocator's own events, FLOPs by counting, time in turns."""

import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import ms_memory

HERE = Path(__file__).parent
aten = torch.ops.aten


def register_attention():
    """Tell torch's counter of FLOPs, and so its partitioner, of the CPU's attention kernel."""
    known = flop_counter.flop_registry
    if aten._scaled_dot_product_flash_attention_for_cpu in known:
        return

    @flop_counter.register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def forward(q, k, v, *args, **kwargs):
        return flop_counter.sdpa_flop_count(q, k, v)

    @flop_counter.register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def backward(grad, q, k, v, *args, **kwargs):
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)


def peak_bytes(run):
    """Most bytes that were allocated at a time beyond those at the start, whoever asked for them.

    The allocator reports compiled code and what operators need inside as well, which no counter of
    tensors or hooks sees.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def flops(run, count=True):
    """FLOPs of the operators that torch has a formula for, and what `run` returned."""
    counter = FlopCounterMode(display=False)
    with counter if count else contextlib.nullcontext():
        found = run()
    return counter.get_total_flops(), found


def clock():
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def turns(runs, rounds, enter=None):
    """Seconds of every contender and round; each round runs every contender once, in turn.

    Args:
        runs: by name.
        rounds: how many.
        enter: name -> context in which it runs, whose own time does not count.
    """
    now = clock()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            with contextlib.nullcontext() if enter is None else enter(name):
                start = now()
                run()
                times[name].append(now() - start)
    return times


def ratios(times, base):
    """Median over the rounds of a contender's time by that of `base`."""
    return {
        name: round(statistics.median(a / b for a, b in zip(t, times[base], strict=True)), 3)
        for name, t in times.items()
    }


def environment():
    return {
        "ms_memory": ms_memory.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "clock": clock().__name__,
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def keep_memory():
    """Start again with a C library that never gives memory back to the system.

    Else large buffers are new pages each time, and their faults are much of what is timed.
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def write(name, content):
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
