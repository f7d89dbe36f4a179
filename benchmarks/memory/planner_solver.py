"""The planner's solver: against trying every plan on 10,000 random instances, and its time.

    python -m benchmarks memory/planner_solver

Each instance has up to 5 sites of up to 4 options, in a chain or with lifetimes that cross, with
and without swaps, micro-batches in flight and a budget of host memory; budgets too small included.
"""

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path
from random import Random

from ms_memory import MemoryFeatureError
from ms_memory.planner import Layer, LayerOption, chain, solve

HERE = Path(__file__).parent
INSTANCES = HERE.parents[1] / "tests" / "memory" / "planner" / "instances.py"


def load_instances():
    spec = importlib.util.spec_from_file_location("instances", INSTANCES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def certificate(count):
    """Compare every answer; counts what went wrong."""
    instances = load_instances()
    wrong = {"over budget": 0, "not the best": 0, "wrong refusal": 0, "wrong minimum": 0}
    plans = 0
    for seed in range(count):
        problem, budget, host = instances.random_instance(Random(seed))
        best = instances.best(problem, budget, host)
        minimum = instances.least_budget(problem, host)
        try:
            plan = solve(problem, budget, host_budget=host, explain=False)
        except MemoryFeatureError as refused:
            code = "E-M32" if minimum is None else "E-M30"
            wrong["wrong refusal"] += best is not None or refused.code != code
            stated = minimum is None or f"{minimum:,} bytes" in str(refused)
            wrong["wrong minimum"] += not stated
            continue
        plans += 1
        wrong["over budget"] += plan.peak > budget
        wrong["not the best"] += (plan.time, plan.host) != best or not plan.proven
        wrong["wrong minimum"] += plan.minimum != minimum
    return {"instances": count, "with a plan": plans, **wrong}


def options(random, swaps):
    made = []
    for k in range(12):
        held = random.randint(10**6, 10**9)
        leaving = held if swaps and k % 3 == 0 else 0
        peak = held + random.randint(0, 10**9)
        made.append(LayerOption(f"o{k}", held, held, peak, leaving, time=3 * 10**16 // held))
    return tuple(made)


def timed(alike, swaps, in_flight, limit):
    """Time 100 layers of 12 options at a budget of 30% of the largest."""
    random = Random(5)
    one = options(random, swaps)
    layers = [
        Layer(f"layer {i}", one if alike else options(random, swaps), in_flight) for i in range(100)
    ]
    budget = 30 * 10**9 * in_flight
    start = time.process_time()
    plan = solve(chain(layers), budget, explain=False, time_limit=limit, clock=time.process_time)
    return {
        "layers": "alike" if alike else "all different",
        "swaps": swaps,
        "in flight": in_flight,
        "seconds": round(time.process_time() - start, 2),
        "proven": plan.proven,
        "gap": round(plan.gap, 5),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    given = parser.parse_args()
    kinds = ((False, 1), (True, 1), (False, 4), (True, 4))
    cases = [(alike, *kind) for alike in (True, False) for kind in kinds]
    rows = []
    for case in cases:
        rows.append(timed(*case, given.limit))
        print(json.dumps(rows[-1]), flush=True)
    found = certificate(given.instances)
    print(json.dumps(found), flush=True)
    environment = {"python": platform.python_version(), "clock": "process_time"}
    if not given.no_write:
        data = {"environment": environment, "certificate": found, "time": rows}
        path = HERE / "results" / "planner_solver.json"
        path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
