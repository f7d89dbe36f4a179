"""What MemoryMeter costs: a training step with it against the same step without it.

The model is that of `mindspeed train` without flags, on one rank, and a tiny one as the worst case,
whose operators are too short to hide anything. Before any time is taken, the meter must agree with
the allocator's own events on the peak of a step, within 1%. The contenders take steps in turns; a
ratio is the median over rounds of step time with a meter by step time without. Processor time is
measured, which other work hardly disturbs.

`interception` is a meter that does nothing, the price of hearing every operator at all; `passed
over` is a step that `sample_every` does not measure; `sample_every=10` is what 10 steps with one
measured take, computed from the two. `hooks` is `saved_bytes`. torch's own MemTracker is missing:
it fails at Megatron's data-parallel wrapper, whose `buffers` is a list.

`--curve FILE.svg` draws the live memory of a step with and without recomputation instead.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import ms_profile
from mindspeed.train import TrainConfig, Trainer
from mindspeed.train.args import DEFAULT_JOB
from ms_profile import MemoryMeter, Meter, saved_bytes

HERE = Path(__file__).parent
TINY = {"num_layers": 4, "hidden_size": 64, "seq_length": 64, "global_batch_size": 4}
EVERY = 10


class Nothing(Meter):
    """Hears everything and does nothing."""

    def after(self, func, args, kwargs, out):
        return out


def allocated_peak(run):
    """Highest running sum of the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def gate(trainer):
    """Both know the peak above what was there before, or nothing is timed."""
    allocated = allocated_peak(trainer.train_step)
    meter = MemoryMeter()
    with meter:
        trainer.train_step()
    found = meter.peak.nbytes
    assert 0.99 * allocated <= found <= 1.01 * allocated, f"{found} is not about {allocated}"
    return {"peak": found, "peak_by_allocator": allocated, "operators": meter.mark("end").index}


def contenders(trainer):
    passing = MemoryMeter(sample_every=10**9)
    with passing:
        pass  # the one entry that is measured
    return {
        "off": contextlib.nullcontext,
        "interception": Nothing,
        "meter": lambda: MemoryMeter(*trainer.chunks),
        "passed over": lambda: passing,
        "hooks": saved_bytes,
    }


def measure(name, job, rounds):
    with Trainer(TrainConfig.of(**job)) as trainer:
        trainer.run(2)
        checked = gate(trainer)
        makers = contenders(trainer)
        times = {contender: [] for contender in makers}
        for _ in range(rounds):
            for contender, make in makers.items():
                context = make()
                start = time.process_time()
                with context:
                    trainer.train_step()
                times[contender].append(time.process_time() - start)
    ratios = {
        contender: statistics.median(
            a / b for a, b in zip(times[contender], times["off"], strict=True)
        )
        for contender in makers
        if contender != "off"
    }
    ratios[f"sample_every={EVERY}"] = (
        ratios["meter"] + (EVERY - 1) * ratios["passed over"]
    ) / EVERY
    return {
        "model": name,
        "step_ms": round(statistics.median(times["off"]) * 1e3, 1),
        **checked,
        "step_time_against_off": {n: round(ratio, 3) for n, ratio in ratios.items()},
    }


class Stack(nn.Module):
    """Six transformer layers, each recomputed or not."""

    def __init__(self, recompute):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
            for _ in range(6)
        )
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def curve(path):
    from ms_profile import report

    meters = {}
    for label, recompute in {"all kept": False, "recomputed": True}.items():
        model = Stack(recompute)
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(8, 256, 256)
        for _ in range(2):  # the second step has its states already
            with MemoryMeter(model, optimizer, x) as meter:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        meters[label] = meter
        print(label, meter.peak.nbytes, meter.peak.phase, meter.peak.module, meter.saved_peak)
    report.memory_curve(meters, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", type=Path, metavar="FILE", help="draw into this .svg or .png")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.curve:
        curve(options.curve)
        return
    base = {**DEFAULT_JOB, "use_distributed_optimizer": False, "optimization_level": 0}
    jobs = {"default": base, "tiny": {**base, **TINY}}
    rows = []
    for name, job in jobs.items():
        rows.append(measure(name, job, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        environment = {
            "ms_profile": ms_profile.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": 1,
            "clock": "process_time",
        }
        content = {"environment": environment, "rounds": options.rounds, "rows": rows}
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / "memory.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
