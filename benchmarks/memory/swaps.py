"""The planner with swaps beside recomputation alone, in exact virtual time, at five budgets.

    python -m benchmarks memory/swaps

The simulated device copies while it computes. Its clock counts matrix products and attention by
their FLOPs, all else by the bytes that it reads and writes. Its rates stand to each other as in a
layer of Llama-7B with 8,192 tokens on an assumed device of 150 TFLOP/s, 1.6 TB/s, and a link of
25 GB/s each way: what a layer saves takes 5/3 of its forward to travel. Whichever machine runs
this, the numbers are the same.
"""

import argparse
import json

import meter
import torch
from gpt import Size, Step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ms_memory import Session, planner
from ms_memory.device import VirtualClock, sim

SIZE = Size(layers=12, hidden=192, heads=3, vocabulary=512, sequence=128, batch=2)
TINY = Size(layers=4, hidden=32, heads=2, vocabulary=64, sequence=48)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
RECOMPUTE = ("discard", "recompute")
ACTIONS = {"recompute only": RECOMPUTE, "with swaps": (*RECOMPUTE, "swap")}
FLOPS_A_SECOND = 10**12
FLOPS_A_BYTE = 150 / 1.6 / 4096  # and a channel: layers of fewer channels do less with a byte
TRAVEL = 5 / 3  # time that what a layer saves is on its way, by that of the layer's forward
# What makes and moves tensors for the simulated device; its link says how long that takes.
FREE = {"copy_", "fill_", "set_", "resize_", "empty", "empty_strided", "new_empty"}
MIN_BYTES = 1024


class Computing(TorchDispatchMode):
    """Lets operators take time on a virtual clock."""

    def __init__(self, clock, hidden):
        super().__init__()
        self.clock = clock
        self.memory = FLOPS_A_SECOND / (FLOPS_A_BYTE * hidden)  # bytes a second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.clock.advance(-(-flops * 10**9 // FLOPS_A_SECOND))
        elif func.overloadpacket.__name__ not in FREE:
            given, made = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in (args, out))
            known = {t.untyped_storage().data_ptr() for t in given}
            view = all(t.untyped_storage().data_ptr() in known for t in made)
            if not view or func._schema.is_mutable:
                nbytes = sum(t.nbytes for t in (*given, *made))
                self.clock.advance(round(nbytes * 1e9 / self.memory))
        return out


class Virtual:
    """A model on a simulated device."""

    def __init__(self, size):
        self.plain = Step(size)
        self.model, self.hidden = self.plain.model, size.hidden
        # Fast enough to measure the rates by; then as slow as they say.
        self.clock = VirtualClock(10**15, 10**15)
        self.reference = self.results()
        start = self.clock.now
        self.step()
        self.unplanned = self.clock.now - start
        rate = self._link(size)
        self.clock, self.rate = VirtualClock(rate, rate), rate

    def step(self):
        with Computing(self.clock, self.hidden):
            return self.plain()

    def results(self):
        with Computing(self.clock, self.hidden):
            return self.plain.results()

    def session(self):
        return Session(self.model, device=sim(clock=self.clock))

    def _link(self, size):
        layer, marks = self.model.blocks[0], []
        hooks = [
            layer.register_forward_pre_hook(lambda *_: marks.append(self.clock.now)),
            layer.register_forward_hook(lambda *_: marks.append(self.clock.now)),
        ]
        with Session(self.model) as session:
            ledger = session.ledger
            self.step()
            saved = sum(n for path, n in ledger.by_module().items() if path.startswith("blocks.0"))
        for hook in hooks:
            hook.remove()
        return round(saved * 1e9 / (TRAVEL * (marks[1] - marks[0])))

    def run(self, plan):
        """A step under a plan: what it took and needed, next to what the plan said."""
        with self.session() as session:
            planner.apply(session, plan)
            found = self.results()
            assert all(map(torch.equal, found, self.reference)), "other gradients"
            start, stalled = self.clock.now, self.clock.stalled
            self.step()
            took, stalled = self.clock.now - start, self.clock.stalled - stalled
            seen = planner.verify(session, self.step, plan)
        return {
            "actions": summary(plan),
            "predicted_ns": plan.time,
            "added_ns": took - self.unplanned,
            "stalled_ns": stalled,
            "predicted_peak": plan.peak - self.plain.nbytes,
            "peak": seen.measured - self.plain.nbytes,
            "host": plan.host,
        }


def summary(plan):
    counts = {}
    for decision in plan.decisions:
        counts[decision.option.name] = counts.get(decision.option.name, 0) + 1
    return ", ".join(f"{name}: {n}" for name, n in counts.items())


def measure(size):
    virtual = Virtual(size)
    with virtual.session() as session:
        found = planner.profile(session, virtual.step, min_bytes=MIN_BYTES)
    problem = found.problem()
    top = max(problem.live([0] * len(problem.sites)))
    least = planner.solve(problem, top, actions=RECOMPUTE).minimum
    rows = []
    for share in SHARES:
        budget = least + round((top - least) * share)
        row = {"share": share, "bytes": budget - virtual.plain.nbytes}
        for name, actions in ACTIONS.items():
            plan = planner.solve(problem, budget, actions=actions, explain=False)
            assert plan.proven
            row[name] = virtual.run(plan)
        rows.append(row)
        print(json.dumps(row), flush=True)
    minimum = planner.solve(problem, top, actions=ACTIONS["with swaps"]).minimum
    return {
        "unplanned_ns": virtual.unplanned,
        "unplanned_bytes": top - virtual.plain.nbytes,
        "link_bytes_a_second": virtual.rate,
        "least_bytes": {
            "recompute only": least - virtual.plain.nbytes,
            "with swaps": minimum - virtual.plain.nbytes,
        },
        "budgets": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    meter.register_attention()
    found = measure(TINY if options.tiny else SIZE)
    if not options.no_write:
        meter.write("swaps", {"environment": meter.environment(), **found})


if __name__ == "__main__":
    main()
