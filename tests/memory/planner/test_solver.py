"""The plan is the best one: against trying everything, on chains and on lifetimes that cross."""

import re
from random import Random

import pytest

from ms_memory import MemoryFeatureError
from ms_memory.planner import (
    Layer,
    LayerOption,
    Option,
    Problem,
    Site,
    Span,
    bound,
    chain,
    pareto,
    solve,
    table,
)

from .instances import best, least_budget, random_chain, random_instance

MS = 1_000_000


def exact(seeds):
    """Solve instances and search them through; how many have a plan, and how many have none."""
    outcomes = {"plan": 0, "none": 0}
    for seed in seeds:
        problem, budget, host_budget = random_instance(Random(seed))
        want = best(problem, budget, host_budget)
        if want is None:
            with pytest.raises(MemoryFeatureError) as refused:
                solve(problem, budget, host_budget=host_budget, explain=False)
            minimum = least_budget(problem, host_budget)
            assert refused.value.code == ("E-M32" if minimum is None else "E-M30"), seed
            assert minimum is None or f"{minimum:,} bytes" in str(refused.value), seed
            outcomes["none"] += 1
            continue
        plan = solve(problem, budget, host_budget=host_budget, explain=False)
        assert (plan.time, plan.host) == want, seed
        assert plan.peak <= budget, seed
        assert plan.minimum == least_budget(problem, host_budget), seed
        assert plan.proven
        assert plan.bound == plan.time
        outcomes["plan"] += 1
    return outcomes


def test_exact_vs_brute():
    assert min(exact(range(300)).values()) > 20  # both happen


@pytest.mark.nightly
def test_exact_vs_brute_1e4():
    assert min(exact(range(10_000)).values()) > 600


MUTANTS = {
    "dominance looks at cost alone": (pareto, "undominated", lambda states: states[:1]),
    "rows have room for everything": (
        table.Table,
        "rooms",
        lambda self, budget, host: (1 << 40,) * len(self.floor),
    ),
    "other prices ask more than the rest costs": (
        bound,
        "_tilted",
        lambda table, rooms, start, tilt: (1 << 99,) * (len(table.uses) + 1),
    ),
    "what is beaten by bytes alone is dropped": (
        table,
        "_unbeaten",
        lambda uses, costs: tuple(i for i, u in enumerate(uses) if sum(u) == min(map(sum, uses))),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_solvers_are_caught(name, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_exact_vs_brute()


def least_of(problem):
    with pytest.raises(MemoryFeatureError) as refused:
        solve(problem, 0)
    return int(re.search(r"plan is ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))


def test_never_exceeds_budget():
    """Larger problems than can be tried out: the replayed plan fits, in time or out of time."""
    for seed in range(8):
        problem = random_chain(Random(seed), 20, 6)
        budget = (least_of(problem) + max(problem.live([0] * 20))) // 2
        for ticks in (10**9, 30):
            clock = iter(range(10**9)).__next__
            plan = solve(problem, budget, time_limit=ticks, clock=clock, explain=False)
            assert max(plan.live) <= budget
            assert plan.bound <= plan.time
            assert plan.gap >= 0


def layer(name="layer", kept=100, cost=7, **more):
    keep = LayerOption("keep", kept, kept, kept + 10)
    recompute = LayerOption("recompute", 10, kept, kept + 20, time=cost * MS)
    return Layer(name, (keep, recompute), **more)


def test_monotone_in_budget():
    problem = random_chain(Random(7), 6, 4)
    top = max(problem.live([0] * 6))
    low = least_budget(problem, None)
    times = [solve(problem, budget, explain=False).time for budget in range(low, top + 1, 3)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_min_budget_message():
    problem = chain([layer(f"layer {i}") for i in range(4)], base=1000)
    with pytest.raises(MemoryFeatureError, match=r"E-M30.*budget that has a plan is 1,140 bytes"):
        solve(problem, 1139)
    plan = solve(problem, 1140)
    assert plan.peak == plan.minimum == 1140
    assert plan.peak_event == "backward layer 3"


def test_a_budget_of_sums_would_be_wrong():
    """What is held fits any time; the recomputation's own peak, or the last layer's, does not."""
    eager = LayerOption("recompute", 10, 100, 500, time=1)
    problem = chain([Layer("a", (LayerOption("keep", 100, 100, 100), eager)), layer("b", 300)])
    plan = solve(problem, 410)
    assert [d.option.name for d in plan.decisions] == ["keep", "keep"]
    with pytest.raises(MemoryFeatureError, match="is 410 bytes"):
        solve(problem, 409)


def test_in_flight_counts_every_micro_batch():
    one = chain([layer(f"layer {i}") for i in range(3)])
    three = chain([layer(f"layer {i}", in_flight=3) for i in range(3)])
    assert max(one.live([0] * 3)) == 310
    assert max(three.live([0] * 3)) == 310 + 2 * 300
    assert max(three.live([1, 0, 0])) == 310 + 2 * 300 - 3 * 90
    assert solve(three, 639).time == 2 * 3 * 7 * MS


def test_swap_window_and_host_bytes():
    """The copy overlaps the next layer: its bytes are alive there, then on the host."""
    swap = LayerOption("swap", 0, 100, 110, leaving=100, host=100)
    layers = [
        Layer(f"layer {i}", (LayerOption("keep", 100, 100, 110), swap, *layer().options[1:]))
        for i in range(4)
    ]
    problem = chain(layers)
    assert problem.live([1, 1, 1, 1])[:4] == (100, 200, 200, 200)
    free = solve(problem, 210)
    assert (free.time, free.host) == (0, 200)  # the first and the last need not go
    assert solve(problem, 250, host_budget=200, explain=False).host <= 200
    with pytest.raises(MemoryFeatureError, match="E-M32"):
        solve(problem, 250, host_budget=200, pins={"*": "swap"})


def test_ties_take_fewer_host_bytes():
    options = tuple(LayerOption(f"o{h}", 0, 0, 0, host=h) for h in (9, 4, 6))
    assert solve(chain([Layer("a", options)]), 10).host == 4


def test_worked_example():
    """A layer of Llama-7B at 8192 tokens, in MiB and us: at a quarter of its bytes nothing that
    has a matrix product is computed again; what is cheap to compute is, and the rest is swapped
    as far as it hides."""
    whole, mib = 1028, 40  # us to copy a MiB at 25 GB/s
    again = {"norms": (128, 170), "activation": (172, 340), "mlp": (516, 10_200)}
    again |= {"attention": (256, 9_200), "all": (964, 25_800)}
    sets = [(), ("norms",), ("activation",), ("norms", "activation"), ("mlp",), ("norms", "mlp")]
    sets += [("attention",), ("norms", "activation", "attention"), ("all",)]
    swaps = {"attention": 256, "mlp": 344, "attention and mlp": 600}
    options = []
    for names in sets:
        held = whole - sum(again[name][0] for name in names)
        time = sum(again[name][1] for name in names)
        some = {k: n for k, n in swaps.items() if not {"attention", "mlp", "all"} & set(names)}
        for swapped, out in {"": 0, **some}.items():
            options.append(
                LayerOption(
                    " + ".join([*names, *(["swap " + swapped] if swapped else [])]) or "keep",
                    held - out, whole, whole, out, time, out * mib, out * mib, host=out,
                )
            )  # fmt: skip
    layers = [Layer(f"l{i}", tuple(options), 1, 25_800, 51_600) for i in range(32)]
    plan = solve(chain(layers), 32 * whole // 4 + 2 * whole, explain=False, time_limit=60)
    assert plan.proven
    done = {name for d in plan.decisions[1:-1] for name in d.option.name.split(" + ")}
    assert done <= {"keep", "norms", "activation", "swap attention", "swap attention and mlp"} | {
        "swap mlp"
    }
    assert plan.time < 32 * (170 + 340 + 1000)


def test_shadow_price_signs():
    problem = chain([layer(f"layer {i}", cost=i + 1) for i in range(8)])
    plan = solve(problem, 480)
    less, more = plan.shadow
    assert less.budget < plan.budget < more.budget
    assert less.time is None or less.time >= plan.time
    assert more.time <= plan.time
    assert plan.curve[0].budget == plan.minimum
    assert plan.curve[-1].time == 0
    assert solve(problem, plan.minimum).shadow[0].time is None


def test_heterogeneous_layers():
    """The layer whose bytes are cheapest to get back goes first, wherever it is."""
    dear, cheap = layer("dear", 100, 50), layer("cheap", 400, 5)
    for order in ((dear, cheap, dear), (cheap, dear, dear)):
        plan = solve(chain(order), 540)
        assert [d.option.name for d in plan.decisions] == [
            "recompute" if one.name == "cheap" else "keep" for one in order
        ]


def test_pins():
    problem = chain([layer(f"model.layers.{i}") for i in range(4)])
    plan = solve(problem, 400, pins={"*.layers.3": "recompute", "*.0": "keep"})
    assert plan.decisions[3].option.name == "recompute"
    assert plan.decisions[0].option.name == "keep"
    with pytest.raises(MemoryFeatureError, match=r"E-M22.*model\.layers"):
        solve(problem, 400, pins={"model.layer.1": "keep"})
    with pytest.raises(MemoryFeatureError, match="E-M22"):
        solve(problem, 400, pins={"*": "swap"})
    with pytest.raises(MemoryFeatureError, match="E-M30"):
        solve(problem, 300, actions=("keep",))
    with pytest.raises(ValueError, match="actions"):
        solve(problem, 300, actions=("compress",))


def test_time_limit_states_bound_and_gap():
    random = Random(3)
    sites = []
    for i in range(30):  # lifetimes that cross: branch and bound
        spans = [Span(e, e + 1, random.randint(50, 99)) for e in range(8)]
        half = [Span(s.start, s.stop, s.nbytes // random.randint(2, 4)) for s in spans]
        none = (Option("keep", tuple(spans)), Option("a", tuple(half), random.randint(30, 60)))
        sites.append(Site(f"s{i}", (*none, Option("b", (), random.randint(60, 99)))))
    problem = Problem(tuple(f"e{e}" for e in range(8)), (0,) * 8, tuple(sites))
    ticks = iter(range(10**9)).__next__
    plan = solve(problem, 1100, time_limit=200, clock=ticks, explain=False)
    assert not plan.proven
    assert plan.peak <= 1100
    assert 0 < plan.bound <= plan.time
    assert 0 <= plan.gap < 0.2
    assert "within" in str(plan)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_many_layers_of_twelve_options(in_flight):
    """All different, with swaps; benchmarks/memory/planner_solver.py times 100 of them."""
    random = Random(5)

    def option(k):
        held = random.randint(10**6, 10**9)
        peaks = held + random.randint(0, 10**8), held + random.randint(0, 10**9)
        leaving = random.randint(0, 10**8) if k % 3 == 0 else 0
        return LayerOption(f"o{k}", held, *peaks, leaving, time=3 * 10**16 // held)

    layers = [Layer(f"l{i}", tuple(map(option, range(12))), in_flight) for i in range(24)]
    problem, budget = chain(layers, base=10**9), 7 * 10**9 * in_flight
    plan = solve(problem, budget, explain=False)
    assert plan.proven
    assert plan.peak <= budget
    # Out of time after the first narrow search: a plan, and how much better another could be.
    ticks = iter(range(10**9)).__next__
    early = solve(problem, budget, explain=False, time_limit=12 * 24 + 5, clock=ticks)
    assert early.peak <= budget
    assert early.bound <= plan.time <= early.time
    assert early.gap < 0.02


def test_bad_problems():
    with pytest.raises(ValueError, match="not negative"):
        Problem(("e",), (0,), (Site("s", (Option("keep", (Span(0, 1, -1),)),)),))
    with pytest.raises(ValueError, match=r"within \[0, 1\)"):
        Problem(("e",), (0,), (Site("s", (Option("keep", (Span(0, 2, 1),)),)),))
    with pytest.raises(ValueError, match="one an event"):
        Problem(("e",), (), ())
    with pytest.raises(ValueError, match="at least"):
        Problem(("e",), (0,), (Site("s", ()),))
