"""What the benchmarks of context parallelism share: processes, inputs, the gate, the clock.

Every round runs every contender once, in turn, on all ranks together; a round of a contender takes
as long as its slowest rank. Ratios are within a round, and their median is reported.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ms_ops
import ms_parallel

HERE = Path(__file__).parent
SEED = 5
PEERS = ("yunchang", "ring-flash-attn", "deepspeed", "transformers", "flash-attn")


def on_ranks(body, size, *args):
    """Run `body(rank, size, *args)` on gloo, a thread a rank; return what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_child, (body, size, folder, args), nprocs=size)
        return json.loads((Path(folder) / "result").read_text())


def _child(rank, body, size, folder, args):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    result = body(rank, size, *args)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def inputs(total, heads, dims, dtype=torch.float32):
    """q, k, v and the gradient of the output, the whole sequence, the same on all ranks."""
    generator = torch.Generator().manual_seed(SEED)
    q, kv = heads
    shapes = ((q, dims), (kv, dims), (kv, dims), (q, dims))
    return [torch.randn(1, total, *s, generator=generator).to(dtype) for s in shapes]


def truth(whole, documents):
    """Output and gradients in fp64, by one process with all tokens; computed by rank 0."""
    *qkv, dout = (x.double() for x in whole)
    if dist.get_rank() == 0:
        leaves = [x.requires_grad_() for x in qkv]
        out = attend(*leaves, documents)
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    else:
        found = [torch.empty_like(x) for x in (dout, *qkv)]
    for x in found:
        dist.broadcast(x, 0)
    return found


def attend(q, k, v, documents=()):
    """Causal attention of one process, [1, s, H, D], inside documents if there are any."""
    if not documents:
        return ms_ops.attention(q, k, v, causal=True)
    ends = torch.tensor(documents, dtype=torch.int32)
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True, "layout": "thd"}
    return ms_ops.attention(q[0], k[0], v[0], **options)[None]


def step(call, tensors, dout):
    """Forward and backward of a contender on this rank's tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def gate(name, found, expected):
    """Compare output and gradients with the truth on all ranks; return the worst relative error.

    Raises:
        ValueError: on every rank, if that of any tensor is more than roundings of bf16 explain.
    """
    worst = torch.tensor(
        [
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(found, expected, strict=True)
        ]
    )
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if not bool((worst < 0.01).all()):
        text = ", ".join(f"{error:.2g}" for error in worst.tolist())
        raise ValueError(f"{name}: wrong: relative error of (out, dq, dk, dv): {text}")
    return float(worst.max())


def interleave(runs, rounds, alone=()):
    """Seconds of every contender and round, of the slowest rank; after a warm-up of each.

    Those in `alone` run on rank 0 while the others wait.
    """
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            if name not in alone or dist.get_rank() == 0:
                run()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:
                times[name].append(float(took))
    return times


def ratios(times, base):
    """Median over the rounds of a contender's time by that of `base`."""
    return {
        name: round(statistics.median(a / b for a, b in zip(t, times[base], strict=True)), 2)
        for name, t in times.items()
    }


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment():
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ()
    )
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    load = os.getloadavg()[0]
    return {
        "ms_parallel": ms_parallel.__version__,
        "ms_ops": ms_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "load_at_start": round(load, 1),
        "peers": {name: installed(name) for name in PEERS},
    }


def write(name, content):
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
