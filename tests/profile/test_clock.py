"""Makespans by hand, by simulation and by real processes: equal, exactly."""

import json
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

from ms_profile.clock import (
    Compute,
    Receive,
    Send,
    VirtualClock,
    chrome_trace,
    from_tensor,
    makespan,
    play,
    simulate,
    to_tensor,
)
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks

P, MICRO = 4, 8
# A stage is two chunks with F = I = W = 1 each.
F, B = 2, 4


def forward(rank, size, j, cost):
    steps = [Receive(rank - 1, f"a{j}")] if rank else []
    steps.append(Compute(cost, f"F{j}"))
    return steps + ([Send(rank + 1, f"a{j}", 8)] if rank < size - 1 else [])


def backward(rank, size, j, cost):
    steps = [Receive(rank + 1, f"g{j}")] if rank < size - 1 else []
    steps.append(Compute(cost, f"B{j}"))
    return steps + ([Send(rank - 1, f"g{j}", 8)] if rank else [])


def one_f_one_b(rank, size=P, micro=MICRO, f=F, b=B):
    warm = min(size - 1 - rank, micro)
    steps = [step for j in range(warm) for step in forward(rank, size, j, f)]
    for j in range(micro):
        if j + warm < micro:
            steps += forward(rank, size, j + warm, f)
        steps += backward(rank, size, j, b)
    return steps


def gpipe(rank, size=P, micro=MICRO, f=F, b=B):
    steps = [step for j in range(micro) for step in forward(rank, size, j, f)]
    return steps + [step for j in range(micro) for step in backward(rank, size, j, b)]


@pytest.mark.parametrize("plan", [one_f_one_b, gpipe])
def test_makespan_by_hand(plan):
    clocks = simulate([plan(rank) for rank in range(P)])
    # The first micro-batch fills p - 1 stages, the last drains them; each stage works in between.
    assert makespan(clocks) == (MICRO + P - 1) * (F + B) == 66
    for rank, clock in enumerate(clocks):
        assert clock.now == 66
        assert clock.busy() == MICRO * (F + B)
        idle = clock.idle()
        assert sum(idle.values()) == (P - 1) * (F + B) == 18
        assert idle["warmup"] == rank * F
        assert idle["cooldown"] == rank * B
        assert idle["steady"] == (P - 1 - rank) * (F + B)


def test_makespan_of_any_size():
    for size in (1, 2, 3, 5):
        for micro in (1, 2, 5, 9):
            for f, b in ((1, 2), (3, 1), (0.5, 0.25)):
                for plan in (one_f_one_b, gpipe):
                    programs = [plan(rank, size, micro, f, b) for rank in range(size)]
                    assert makespan(simulate(programs)) == (micro + size - 1) * (f + b)


def test_links_cost_latency_and_bytes():
    programs = [
        [Compute(3), Send(1, "x", 10), Compute(1)],
        [Compute(1), Receive(0, "x"), Compute(2)],
    ]
    first, second = simulate(programs, latency=Fraction(1, 3), per_byte=0.5)
    assert second.now == first.now == 3 + Fraction(1, 3) + 5 + 2
    assert second.idle() == {"warmup": 0, "steady": 2 + Fraction(1, 3) + 5, "cooldown": 0}
    assert first.idle()["cooldown"] == second.now - 4
    # What came earlier than it is wanted costs no waiting.
    assert simulate([[Send(1)], [Compute(9), Receive(0)]], latency=8)[1].now == 9


def test_two_stages_with_latency_by_hand():
    """1F1B, p = 2, m = 2, F = 2, B = 4, latency 1.

    Rank 0: F0 0-2, F1 2-4, B0 when g0 comes, B1. Rank 1: F0 3-5, B0 5-9, F1 9-11, B1 11-15.
    g0 arrives at 10: B0 10-14; g1 arrives at 16: B1 16-20.
    """
    clocks = simulate([one_f_one_b(rank, 2, 2) for rank in range(2)], latency=1)
    assert makespan(clocks) == 20
    begins = [(span.name, span.begin) for span in clocks[1].spans if span.kind == "compute"]
    assert begins == [("F0", 3), ("B0", 5), ("F1", 9), ("B1", 11)]
    assert clocks[0].idle() == {"warmup": 0, "steady": 8, "cooldown": 0}


def over_gloo(rank, world_size, latency):
    """The same steps with real messages: payload and stamp; tags in the order of the steps."""
    clock = VirtualClock(latency=latency, per_byte=0.25)
    pending = []

    def number(tag):
        return int(tag[1:]) * 2 + (tag[0] == "g")

    def send(step, stamp):
        for turn, tensor in enumerate((to_tensor(stamp), torch.full((1,), float(rank)))):
            pending.append(dist.isend(tensor, step.to, tag=2 * number(step.tag) + turn))

    def receive(step):
        stamp, payload = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
        for turn, tensor in enumerate((stamp, payload)):
            dist.recv(tensor, step.source, tag=2 * number(step.tag) + turn)
        assert payload.item() == step.source
        return from_tensor(stamp)

    play(one_f_one_b(rank), clock, send, receive)
    for work in pending:
        work.wait()
    latest = to_tensor(clock.now)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    clock.finish(from_tensor(latest))
    return clock.spans, clock.idle()


def test_real_processes_end_when_the_simulation_does():
    programs = [one_f_one_b(rank) for rank in range(P)]
    for latency in (0, 0.375):
        simulated = simulate(programs, latency=latency, per_byte=0.25)
        for clock, (spans, idle) in zip(simulated, run_ranks(over_gloo, P, latency), strict=True):
            assert spans == clock.spans
            assert idle == clock.idle()


EARLY = Mutation(
    "a message arrives before it is sent",
    "ms_profile.clock:VirtualClock.receive",
    'max(self._now, _time("stamp", stamp))',
    "self._now",
)
NO_BYTES = Mutation(
    "bytes cost nothing",
    "ms_profile.clock:VirtualClock.send",
    ' + self._per_byte * _time("nbytes", nbytes)',
    "",
)


@pytest.mark.parametrize(
    ("mutation", "check"),
    [
        (EARLY, lambda: test_makespan_by_hand(one_f_one_b)),
        (NO_BYTES, test_links_cost_latency_and_bytes),
    ],
    ids=["early message", "free bytes"],
)
def test_a_wrong_clock_is_caught(mutation, check):
    assert_caught(mutation, check)


def test_deadlock_is_named():
    with pytest.raises(RuntimeError, match=r"rank 0 at Receive\(source=1, tag='x'\), rank 1"):
        simulate([[Receive(1, "x"), Send(1)], [Receive(0), Send(0, "x")]])


def test_stamps_are_exact_or_refused():
    for stamp in (0, 0.1, Fraction(7, 1024), 2**40 + 0.5):
        assert from_tensor(to_tensor(stamp)) == Fraction(stamp)
    with pytest.raises(ValueError, match="not exact in a float64"):
        to_tensor(Fraction(1, 3))
    assert to_tensor(1).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: VirtualClock(latency=-1), ValueError),
        (lambda: VirtualClock().compute(float("nan")), ValueError),
        (lambda: VirtualClock().compute("2"), TypeError),
        (lambda: VirtualClock().send(-8), ValueError),
        (lambda: VirtualClock().receive(float("inf")), ValueError),
    ],
)
def test_bad_times(call, error):
    with pytest.raises(error, match="must"):
        call()


def test_an_end_before_now():
    clock = VirtualClock()
    clock.compute(2)
    with pytest.raises(ValueError, match="this rank is at 2"):
        clock.finish(1)
    assert simulate([]) == ()


def test_records_and_chrome_trace():
    clocks = simulate([one_f_one_b(rank) for rank in range(P)])
    trace = json.loads(json.dumps(chrome_trace(clocks, unit_s=1)))
    events = [event for event in trace["traceEvents"] if event.get("cat") == "compute"]
    assert len(events) == P * MICRO * 2
    last = max(events, key=lambda event: event["ts"] + event["dur"])
    assert (last["name"], last["pid"], last["ts"] + last["dur"]) == ("B7", 0, 66e6)
    assert chrome_trace({3: clocks[3]})["traceEvents"][0]["pid"] == 3
    record = clocks[1].as_dict(1)
    assert (record["kind"], record["version"], record["rank"]) == ("events", 1, 1)
    assert record["events"][0] == {"name": "a0", "kind": "wait", "begin": 0.0, "end": 2.0}
