"""Time an operator against its peers: correctness gate first, then one interleaved run.

Every round runs every contender once, in turn, so that whatever else the machine does hits all of
them alike. Reported is the median over rounds of the ratio to the eager composition within the
round; absolute medians are there to judge the size of the work only. With one thread the clock is
the processor time of this process, which other work on the machine hardly disturbs.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ms_ops
from ms_ops import registry, testing
from ms_ops.opdef import OPERATORS

HERE = Path(__file__).parent
SEED = 11


@dataclass(frozen=True)
class Case:
    """One shape: `make()` returns the arguments; `grads` are positions that are differentiated."""

    name: str
    make: object
    grads: tuple = (0,)
    kwargs: dict = field(default_factory=dict)


def step(function, args, kwargs, dy):
    """Forward and backward; returns output and gradients."""
    out = function(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def arguments(case, dtype):
    torch.manual_seed(SEED)
    args = list(case.make(dtype))
    for i in case.grads:
        args[i] = args[i].detach().requires_grad_()
    return args


def gate(function, plain, case, dtype):
    """Check outputs and gradients against fp64; return the worst error of both in roundings."""
    args = arguments(case, dtype)
    out = plain(*args, **case.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    dy = torch.randn(out.shape).to(out.dtype)
    wide = [a.detach().double() if torch.is_tensor(a) else a for a in args]
    for i in case.grads:
        wide[i].requires_grad_()
    truth = step(plain, wide, case.kwargs, dy.double())
    got, other = (step(f, args, case.kwargs, dy) for f in (function, plain))
    for i, (mine, exact, peer) in enumerate(zip(got, truth, other, strict=True)):
        testing.assert_close("MG", f"{case.name} tensor {i}", mine, exact, peer, dtype)
    ours = max(testing.roundings(a, b) for a, b in zip(got, truth, strict=True))
    theirs = max(testing.roundings(a, b) for a, b in zip(other, truth, strict=True))
    return dy, round(ours, 2), round(theirs, 2)


def clock():
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleave(runs, rounds):
    """Return seconds per contender and round, after one warm-up each."""
    now = clock()
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            run()
            times[name].append(now() - start)
    return times


def saved_bytes(function, args, kwargs):
    """Bytes that autograd keeps between forward and backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*args, **kwargs)
    del out
    return sum(kept.values())


class Moved(TorchDispatchMode):
    """Counts the bytes that dispatched operators read and write, views and our own shells apart.

    An operator is taken to read each tensor that it is given, and write each that it returns, once.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ms":
            op, direction = func._opname, "forward"
            if op not in OPERATORS:
                op, direction = op.removesuffix("_backward"), "backward"
            with self:  # what the operator runs inside is counted, not the operator
                return getattr(registry.kernel(op, args[-1]), direction)(*args[:-1])
        out = func(*args, **(kwargs or {}))
        given, returned = (
            [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
            for x in ((args, kwargs), out)
        )
        kept = {t.untyped_storage().data_ptr() for t in given}
        is_view = not func._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in kept for t in returned
        )
        if not is_view:
            self.total += sum(t.numel() * t.element_size() for t in (*given, *returned))
        return out


def moved_bytes(function, args, kwargs, dy):
    """Bytes that one forward and backward moves, as `Moved` counts."""
    with Moved() as moved:
        step(function, args, kwargs, dy)
    return moved.total


def least_bytes(args, dy):
    """Bytes of a forward and a backward that read and write each tensor of theirs once."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    once = sum(t.numel() * t.element_size() for t in (*tensors, dy))
    return 2 * once + sum(t.numel() * t.element_size() for t in tensors if t.requires_grad)


def by_compiled_backend(function):
    def call(*args, **kwargs):
        with ms_ops.backend("compiled"):
            return function(*args, **kwargs)

    return call


def measure(function, peers, case, dtype, rounds, compiled=False):
    dy, ours, theirs = gate(function, peers["eager"], case, dtype)
    args = arguments(case, dtype)
    if compiled:
        peers = {**peers, "ms_ops compiled": by_compiled_backend(function)}
        gate(peers["ms_ops compiled"], peers["eager"], case, dtype)
    contenders = {"ms_ops": function, **peers}
    runs = {name: (lambda f=f: step(f, args, case.kwargs, dy)) for name, f in contenders.items()}
    times = interleave(runs, rounds)
    ratio = {
        name: statistics.median(a / b for a, b in zip(times[name], times["ms_ops"], strict=True))
        for name in peers
    }
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "median_ms": {n: round(statistics.median(t) * 1e3, 3) for n, t in times.items()},
        "times_as_fast_as": {name: round(value, 2) for name, value in ratio.items()},
        "saved_bytes": {
            n: saved_bytes(f, args, case.kwargs)
            for n, f in contenders.items()
            if "compiled" not in n
        },
        "bytes_moved_over_least": {
            n: round(moved_bytes(f, args, case.kwargs, dy) / least_bytes(args, dy), 2)
            for n, f in contenders.items()
            if n in ("ms_ops", "eager", "torch")
        },
        "error_in_roundings": {"ms_ops": ours, "eager": theirs},
    }


def environment():
    return {
        "ms_ops": ms_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "clock": clock().__name__,
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def keep_memory():
    """Start again with a C library that never gives memory back to the system.

    Else buffers above 32 MiB are new pages each time, and their faults are most of what is timed.
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main(op, function, peers, cases, compiled=False):
    """Run all cases of one operator in fp32 and bf16, print a table, write `results/<op>.json`.

    With `compiled`, our own backend of that name is a contender, too.
    """
    keep_memory()
    parser = argparse.ArgumentParser(description=f"Benchmark of ms_ops.{op} on this machine's CPU.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases:
            rows.append(measure(function, peers, case, dtype, options.rounds, compiled))
            print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        write(op, {"environment": environment(), "rounds": options.rounds, "rows": rows})


def write(name, content):
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
