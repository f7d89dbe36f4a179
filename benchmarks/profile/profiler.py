"""What a traced step costs, and one outside the window: a small transformer on this machine's CPU.

First the gate: the trace holds the asked steps and the losses are those of a run without. Then the
contenders take steps in turns; a ratio is the median over rounds of a step inside the window by the
same step without a profiler. Outside the window a profiler only compares numbers, far below what a
ratio of steps can show: there the calls themselves are timed.
"""

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import ms_profile
from ms_profile import profile

HERE = Path(__file__).parent
WINDOWS = {
    "cpu": {},
    "cpu, shapes": {"shapes": True},
    "cpu, memory": {"memory": True},
    "cpu, stack": {"stack": True},
    "cpu, shapes, memory, stack": {"shapes": True, "memory": True, "stack": True},
    "cpu, level 1 with gloo": {"level": 1},
}


class Loop:
    """Training of an encoder with 2 layers, width 128, 4 x 64 tokens."""

    def __init__(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.x = torch.randn(4, 64, 128)

    def step(self):
        loss = (self.model(self.x) - self.x.flip(1)).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        return loss.item()


def gate(folder):
    def losses(profiler):
        loop, found = Loop(), []
        with profiler:
            for iteration in range(1, 7):
                profiler.step(iteration)
                found.append(loop.step())
        return found

    plain = losses(profile(3, 5, backend="none"))
    for name, options in WINDOWS.items():
        traced = profile(3, 5, out=folder, **options)
        assert losses(traced) == plain, name
        assert traced.summary()["steps"] == [3, 4], name


def timed(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def window(loop, folder, options):
    """Seconds of one step inside a window, of switching on and off with the files, and bytes."""
    profiler = profile(2, 3, out=folder, **options)
    profiler.begin(1)
    loop.step()
    profiler.end(1)
    around = timed(lambda: profiler.begin(2))
    inside = timed(loop.step)
    around += timed(lambda: profiler.end(2))
    assert profiler.failure is None
    return inside, around, sum(path.stat().st_size for path in profiler.files)


def outside(calls):
    """Seconds of begin and end in an iteration that is not traced."""
    with tempfile.TemporaryDirectory() as folder:
        profiler = profile(10**8, 10**8 + 1, out=folder)
        profiler.begin(1)

        def run():
            for iteration in range(1, calls + 1):
                profiler.begin(iteration)
                profiler.end(iteration)

        return min(timed(run) for _ in range(5)) / calls


def measure(rounds):
    loop = Loop()
    plain, rows = [], {name: [] for name in WINDOWS}
    with tempfile.TemporaryDirectory() as folder:
        gate(folder)
        for _ in range(rounds):
            loop.step()
            plain.append(timed(loop.step))
            for name, options in WINDOWS.items():
                rows[name].append(window(loop, folder, options))
    step, idle = statistics.median(plain), outside(100_000)
    out = {
        "step_ms": round(step * 1e3, 2),
        "outside": {"ns": round(idle * 1e9), "percent_of_step": round(100 * idle / step, 4)},
    }
    for name, found in rows.items():
        ratios = [inside / base for (inside, _, _), base in zip(found, plain, strict=True)]
        out[name] = {
            "times_a_step": round(statistics.median(ratios), 2),
            "start_and_files_ms": round(statistics.median(row[1] for row in found) * 1e3, 1),
            "kilobytes_a_step": round(statistics.median(row[2] for row in found) / 1e3),
        }
    return out


def environment():
    return {
        "ms_profile": ms_profile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "clock": "process_time",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    # Alone in its world: level 1 looks for gloo, whose collectives it would name.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {"environment": environment(), "rounds": options.rounds, **measure(options.rounds)}
    print(json.dumps(found, indent=1))
    assert found["outside"]["percent_of_step"] < 1
    if not options.no_write:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / "profiler.json").write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
