"""The pictures of docs/profile/report.md: four small processes train, and are measured.

python -m benchmarks profile/pictures             into docs/profile/
python -m benchmarks profile/pictures --out DIR   with the profile folders, for `mindspeed profile`
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from ms_profile import CommMeter, EventTrace, FlopMeter, MemoryMeter, profile, report
from ms_profile.events import LinkDelay

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.ranks import run_ranks  # noqa: E402

RUNS = ("plain", "recompute", "overlap")
RANKS, WIDTH, HIDDEN, TOKENS, LAYERS = 4, 128, 512, 256, 4


class Reduce(torch.autograd.Function):
    """Sum over the tensor-parallel group."""

    @staticmethod
    def forward(ctx, x, group):
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Block(nn.Module):
    """A column- and a row-parallel product, each rank with its half."""

    def __init__(self, group):
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN // 2)
        self.down = nn.Linear(HIDDEN // 2, WIDTH)
        self.group = group

    def forward(self, x):
        return x + Reduce.apply(self.down(torch.nn.functional.gelu(self.up(x))), self.group)


class Model(nn.Module):
    def __init__(self, group, recompute):
        super().__init__()
        self.layers = nn.ModuleList(Block(group) for _ in range(LAYERS))
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def groups(rank):
    """Tensor-parallel group and data-parallel group of this rank."""
    tp = [dist.new_group([a, a + 1], group_desc="tp") for a in (0, 2)]
    dp = [dist.new_group([a, a + 2], group_desc="dp") for a in (0, 1)]
    return tp[rank // 2], dp[rank % 2]


def step(model, x, dp, wait=False):
    """Gradients are reduced as soon as each is there, while backward goes on unless it waits."""
    works = []

    def reduce(parameter):
        works.append(dist.all_reduce(parameter.grad, group=dp, async_op=True))
        if wait:  # else it is chance at which operator the other thread lets go of its memory
            works.pop().wait()

    handles = [p.register_post_accumulate_grad_hook(reduce) for p in model.parameters()]
    model(x).square().mean().backward()
    for work in works:
        work.wait()
    for handle in handles:
        handle.remove()


def train(rank, world_size, recompute, folder):
    torch.manual_seed(0)
    tp, dp = groups(rank)
    model, x = Model(tp, recompute), torch.randn(TOKENS, WIDTH)
    with profile(3, 5, out=folder, level=1, memory=True) as profiler:
        for iteration in range(1, 6):
            profiler.step(iteration)
            step(model, x, dp)
            model.zero_grad()
    meters = [MemoryMeter(model), CommMeter(), FlopMeter()]
    with meters[0], meters[1], meters[2]:
        step(model, x, dp, wait=True)
    for meter in meters:
        report.save(meter, folder, rank)


def overlap(rank, world_size, folder):
    """Gradients travel on a link that takes 5 ms for each, while backward goes on."""
    torch.manual_seed(0)
    group = dist.new_group(list(range(world_size)), group_desc="dp")
    parts = [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(3)]
    model, x = nn.Sequential(*parts), torch.randn(512, 256)
    for _ in range(2):
        step(model, x, group)
        model.zero_grad()
    dist.barrier()
    with EventTrace() as trace, LinkDelay(latency=0.005), trace.mark("step"):
        step(model, x, group)
    report.save(trace, folder, rank)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the profile folders and pictures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.out or Path(temporary)
        for name in RUNS[:2]:
            run_ranks(train, RANKS, name == "recompute", str(root / name), timeout=120)
        run_ranks(overlap, 2, str(root / "overlap"), timeout=120)
        plain, less, events = (report.read_run(root / name).meters for name in RUNS)
        place = options.out or ROOT / "docs" / "profile"
        curves = {"plain": plain["memory"][0], "with recomputation": less["memory"][0]}
        print(report.memory_curve(curves, place / "report-memory.svg", by="operator"))
        print(report.communication_matrix(plain["comm"], place / "report-communication.svg"))
        print(report.timeline(events["events"], place / "report-timeline.svg"))
        if options.out:
            print(report.timeline(events["events"], place / "report-timeline.json"))


if __name__ == "__main__":
    import pictures  # by this name, and not as __main__, the processes find `train`

    pictures.main()
