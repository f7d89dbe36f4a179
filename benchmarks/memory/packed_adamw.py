"""PackedAdamW against AdamW on fp32 masters with bf16 copies: step time and bytes a parameter.

    python -m benchmarks memory/packed_adamw --threads 1

The trajectories are compared bit for bit before anything is timed. Every round runs every contender
once, in turn; the ratio is the median over rounds. Bytes are the state beside weights and
gradients, and what the allocator gave beyond it during a step.
"""

import argparse
import json

import meter
import torch

from ms_memory import PackedAdamW

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
    made, count = contenders(sizes, block), sum(sizes)
    steps = {name: optimizer.step for name, (optimizer, _) in made.items()}
    meter.turns(steps, 2)
    exact = zip(made["packed rne"][1], made["master"][1], strict=True)
    assert all(torch.equal(a, b) for a, b in exact), "the trajectories differ"
    held = {name: optimizer.nbytes() / count for name, (optimizer, _) in made.items()}
    return {
        "tensors": f"{len(sizes)} x {sizes[0]}",
        "time_over_master": meter.ratios(meter.turns(steps, rounds), "master"),
        "bytes_a_parameter_beside_weights": {n: round(v, 3) for n, v in held.items()},
        "more_bytes_in_a_step": {name: meter.peak_bytes(step) for name, step in steps.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    meter.keep_memory()
    torch.set_num_threads(options.threads)
    environment, rows = {**meter.environment(), "block": options.block}, []
    for sizes in SIZES:
        rows.append(measure(sizes, options.block, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if not options.no_write:
        meter.write("packed_adamw", {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()
