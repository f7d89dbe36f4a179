"""PackedAdamW against AdamW on fp32 masters with bf16 copies: step time and bytes a parameter.

    python -m benchmarks memory/packed_adamw --threads 1

The trajectories are compared bit for bit before anything is timed. Every round runs every contender
once, in turn; the ratio is the median over rounds.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from ms_memory import PackedAdamW

HERE = Path(__file__).parent
SIZES = ((1 << 22,), (1 << 18,) * 8, (4096,) * 64)


class MasterAdamW:
    """What most trainers do: fp32 copies, torch's fused AdamW on them, a cast back."""

    def __init__(self, params, **options):
        self.params = params
        self.masters = [p.detach().float().requires_grad_() for p in params]
        self.inner = torch.optim.AdamW(self.masters, fused=True, **options)

    @torch.no_grad()
    def step(self):
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = p.grad.float()
        self.inner.step()
        torch._foreach_copy_(self.params, self.masters)
        for master in self.masters:
            master.grad = None

    def nbytes(self):
        moments = [t for s in self.inner.state.values() for t in s.values() if t.dim()]
        return sum(t.numel() * t.element_size() for t in (*self.masters, *moments))


def contenders(sizes, block):
    made = {}
    for name in ("packed rna", "packed rne", "master"):
        torch.manual_seed(1)
        params = [torch.randn(n).to(torch.bfloat16).requires_grad_() for n in sizes]
        for p in params:
            p.grad = torch.randn(p.shape).to(torch.bfloat16)
        options = {"lr": 1e-3, "weight_decay": 0.1}
        if name == "master":
            made[name] = MasterAdamW(params, **options), params
        else:
            rounding = name.split()[1]
            made[name] = PackedAdamW(params, rounding=rounding, block=block, **options), params
    return made


def measure(sizes, block, rounds):
    made = contenders(sizes, block)
    times = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name, (optimizer, _) in made.items():
            start = time.process_time()
            optimizer.step()
            times[name].append(time.process_time() - start)
    exact = zip(made["packed rne"][1], made["master"][1], strict=True)
    assert all(torch.equal(a, b) for a, b in exact), "the trajectories differ"
    count = sum(sizes)
    ratio = {
        name: statistics.median(a / b for a, b in zip(t[1:], times["master"][1:], strict=True))
        for name, t in times.items()
    }
    return {
        "tensors": f"{len(sizes)} x {sizes[0]}",
        "time_over_master": {name: round(value, 2) for name, value in ratio.items()},
        "bytes_a_parameter_beside_weights": {
            name: round(optimizer.nbytes() / count, 3) for name, (optimizer, _) in made.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for sizes in SIZES:
        rows.append(measure(sizes, options.block, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "block": options.block,
        "clock": "process_time",
    }
    if not options.no_write:
        text = json.dumps({"environment": environment, "rows": rows}, indent=1)
        (HERE / "results" / "packed_adamw.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
