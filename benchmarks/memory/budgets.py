"""The planner beside what others offer: step time at equal measured bytes, at five budgets.

    python -m benchmarks memory/budgets --threads 1

A GPT of 50 million parameters, forward and backward. Bytes are the allocator's peak in a step
beyond parameters and gradients. Budgets lie between the step that recomputes every layer and the
one that recomputes nothing. Each contender enters a budget with the fastest of its settings that
measures below it, by FLOPs; gradients are compared before anything is timed. Swaps are in `swaps`.
torch.compile needs a C++ compiler, its solver "ilp" needs scipy and is left out without.
"""

import argparse
import contextlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec

import meter
import peers
import torch
from gpt import Size, Step
from swaps import Computing

from ms_memory import MemoryFeatureError, Session, planner
from ms_memory.device import VirtualClock

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
FRACTIONS = tuple(i / 10 for i in range(9, 0, -1))
SOLVERS = ("dp", "greedy", "ilp") if find_spec("scipy") else ("dp", "greedy")
UNPLANNED = "nothing"
TINY = Size(layers=3, hidden=32, heads=2, vocabulary=64, sequence=48)


@dataclass
class Setting:
    """One way to run the step.

    Attributes:
        name: for the report.
        enter: makes the context, for a model, in which the step runs so.
        nbytes: peak of a step.
        flops: of a step.
    """

    name: str
    enter: object
    nbytes: int = -1
    flops: int = -1
    kind: str = field(default="eager")


class Bench:
    """A model, and the settings that were measured on it."""

    def __init__(self, size, backend):
        self.size, self.backend = size, backend
        self.step = Step(size)
        self.plain = Setting(UNPLANNED, peers.nothing)
        self.plain.flops, self.reference = meter.flops(self.step.results)
        self.measure(self.plain)
        self.compiled = self._compiled(1.0, SOLVERS[0])
        self.families = self._families()

    def measure(self, setting):
        """Fill in the bytes of a setting, once."""
        if setting.nbytes < 0:
            with setting.enter(self.step.model):
                if setting.kind == "compiled":
                    self.step()
                setting.nbytes = meter.peak_bytes(self.step)
        return setting

    def check(self, setting):
        """Fill in the FLOPs, once, and compare loss and gradients with the plain step's."""
        if setting.flops < 0:
            with setting.enter(self.step.model):
                counted, found = meter.flops(self.step.results, setting.kind == "eager")
            compare(setting, found, self.reference)
            # Of compiled settings those of the layers alone, which is where they differ.
            compiled = setting.kind == "compiled"
            setting.flops = setting.enter.flops * self.size.layers if compiled else counted
        return setting

    def _families(self):
        """Name of a contender -> chains of settings, each from many bytes to few."""
        layers = range(1, self.size.layers + 1)
        sets = (["core_attn"], ["layernorm"], ["core_attn", "layernorm"], ["mlp"])
        sets = (*sets, ["core_attn", "mlp"], ["layernorm", "mlp"])
        sizes = (1, 2, 3)
        found = {
            "torch SAC": [
                [Setting(f"{policy}, {k} layers", peers.sac(policy, k)) for k in layers]
                for policy in peers.POLICIES
            ],
            "Megatron selective": [
                [Setting(", ".join(parts), peers.selective(*parts))] for parts in sets
            ],
            "Megatron full, block": [[Setting(f"{k} layers", peers.block(k)) for k in layers]],
            "Megatron full, uniform": [[Setting(f"by {k}", peers.uniform(k))] for k in sizes],
        }
        ends = self.compiled, self._compiled(0.0, SOLVERS[0])  # whatever the solver
        for solver in SOLVERS:
            between = [self._compiled(f, solver) for f in FRACTIONS]
            found[f"torch.compile, {solver}"] = [[one] for one in (ends[0], *between, ends[1])]
        return found

    def _compiled(self, fraction, solver):
        made = peers.Compiled(fraction, solver, self.backend)
        return Setting(f"{fraction}", made, kind="compiled")

    def fitting(self, chains, budget):
        """Return the setting with the fewest FLOPs, then most bytes, within a budget."""
        found = [s for chain in chains if (s := self._first(chain, budget)) is not None]
        for setting in found:
            self.check(setting)
        return min(found, key=lambda s: (s.flops, -s.nbytes), default=None)

    def _first(self, chain, budget):
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if self.measure(chain[middle]).nbytes <= budget:
                high = middle
            else:
                low = middle + 1
        return chain[low] if low < len(chain) else None


def compare(setting, found, wanted):
    """Gradients are bit-equal; those of compiled graphs, which round elsewhere, nearly."""
    for mine, plain in zip(found, wanted, strict=True):
        if setting.kind == "compiled":
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(mine, plain), f"{setting.name}: other gradients"


def planned(bench, problem, budget):
    """Return the planner's setting, None where no plan fits.

    What kernels allocate inside, no plan knows; it is taken off the budget once, as
    `planner.plan` does.
    """
    limit = bench.step.nbytes + budget
    for _ in range(2):
        try:
            plan = planner.solve(problem, limit, explain=False)
        except MemoryFeatureError as refused:
            if refused.code != "E-M30":
                raise
            return None
        setting = bench.check(bench.measure(Setting(summary(plan), partial(applied, plan))))
        if setting.nbytes <= budget:
            break
        limit -= setting.nbytes - budget
    return setting


@contextlib.contextmanager
def applied(plan, model):
    with Session(model) as session:
        planner.apply(session, plan)
        yield


def summary(plan):
    counts = {}
    for decision in plan.decisions:
        counts[decision.option.name] = counts.get(decision.option.name, 0) + 1
    return ", ".join(f"{name} {n}" for name, n in counts.items() if name != "keep") or "keep all"


def problems(bench, clock):
    """What the planner solves: with times as measured, and with times that are only counted."""
    model, virtual = bench.step.model, VirtualClock(1, 1)
    computing = Computing(virtual, bench.size.hidden)

    def counted():
        with computing:
            return bench.step()

    return {
        "planner": planner.profile(model, bench.step, steps=4, clock=clock).problem(),
        "planner, times counted": planner.profile(
            model, counted, steps=1, clock=lambda: virtual.now
        ).problem(),
    }


def at_budgets(bench, clock):
    """Choose every contender's setting at every budget."""
    start = time.process_time()
    found = problems(bench, clock)
    print(f"profiles: {time.process_time() - start:.0f} s", flush=True)
    least = bench.measure(bench.families["Megatron full, uniform"][0][0])
    bench.check(bench.measure(bench.compiled))
    rows, span = [], bench.plain.nbytes - least.nbytes
    for share in SHARES:
        budget = least.nbytes + round(span * share)
        chosen = {n: planned(bench, p, budget) for n, p in found.items()}
        for name, chains in bench.families.items():
            chosen[name] = bench.fitting(chains, budget)
        rows.append((share, budget, chosen))
        print(share, budget, {n: s and s.name for n, s in chosen.items()}, flush=True)
    return rows


def timed(bench, rows, rounds):
    """Median time of every chosen setting by that of the plain step."""
    settings = {id(bench.plain): bench.plain}
    for setting in (bench.compiled, *(s for _, _, chosen in rows for s in chosen.values())):
        if setting is not None:
            settings[id(setting)] = setting
    runs = dict.fromkeys(settings, bench.step)
    times = meter.turns(runs, rounds, lambda key: settings[key].enter(bench.step.model))
    if not rounds:
        return dict.fromkeys(times), []
    return meter.ratios(times, id(bench.plain)), times[id(bench.plain)]


def entry(bench, setting, ratios):
    if setting is None:
        return None
    # Compiled graphs are counted a layer at a time; without a budget they compute nothing twice.
    compiled = setting.kind == "compiled"
    base = bench.compiled if compiled else bench.plain
    return {
        "setting": setting.name,
        "bytes": setting.nbytes,
        "flops_added": setting.flops - base.flops,
        "time": ratios[id(setting)],
    }


def result(bench, rows, ratios, times):
    compiled = bench.compiled
    size = {**asdict(bench.size), "parameters": bench.step.nbytes // 4}
    return {
        "model": size,
        "unplanned": {
            "bytes": bench.plain.nbytes,
            "flops": bench.plain.flops,
            "median_ms": round(statistics.median(times) * 1e3, 1) if times else None,
            "compiled_bytes": compiled.nbytes,
            "compiled_time": ratios[id(compiled)],
        },
        "budgets": [
            {
                "share": share,
                "bytes": budget,
                "contenders": {name: entry(bench, s, ratios) for name, s in chosen.items()},
            }
            for share, budget, chosen in rows
        ],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="0: no times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small model, without inductor")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    meter.keep_memory()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 1000  # each setting compiles the same function
    meter.register_attention()
    environment = meter.environment()
    bench = Bench(*((TINY, "eager") if options.tiny else (Size(), "inductor")))
    clock = time.process_time_ns if options.threads == 1 else time.perf_counter_ns
    rows = at_budgets(bench, clock)
    ratios, times = timed(bench, rows, options.rounds)
    found = result(bench, rows, ratios, times)
    print(json.dumps(found, indent=1))
    if not options.no_write:
        content = {"environment": environment, "rounds": options.rounds, **found}
        meter.write("budgets", content)


if __name__ == "__main__":
    main()
