"""Order of launches, waits and compute; handles of communications keep every behaviour."""

import gc
import json
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from ms_profile.comm import CommMeter
from ms_profile.events import EventTrace, LinkDelay, work
from ms_profile.events.record import union
from support.fake import fake_world
from support.mutation import Mutation
from support.ranks import RankError, run_ranks


def launches(trace):
    return [edge for edge in trace.edges if edge.startswith("launch")]


def overlapping(rank, world_size):
    """A step whose expert runs while tokens travel, then one that waits first."""
    x, weight = torch.ones(64, 64), torch.ones(64, 64)
    out = torch.empty_like(x)
    with EventTrace() as trace:
        handle = dist.all_to_all_single(out, x, async_op=True)
        with trace.mark("expert"):
            weight @ x
        handle.wait()
        handle = dist.all_to_all_single(out, x, async_op=True)
        handle.wait()
        with trace.mark("expert"):
            weight @ x
    assert trace.happens_before("launch:all_to_all#0", "begin:expert#0")
    assert trace.happens_before("end:expert#0", "wait:all_to_all#0")
    assert trace.happens_before("waited:all_to_all#1", "begin:expert#1")
    assert trace.happens_before("begin:aten.mm#0", "wait:all_to_all#0")
    assert trace.order("wait:all_to_all#1", "begin:expert#1", "launch:all_to_all#0") == (
        "launch:all_to_all#0",
        "wait:all_to_all#1",
        "begin:expert#1",
    )
    assert trace.overlapped("all_to_all#1") == trace.overlapped("all_to_all#1", by="expert") == 0
    assert len(trace.intervals("expert")) == 2
    (begin, end) = trace.intervals("expert#1")[0]
    assert 0 < begin < end
    for name in ("all_to_all#0", "all_to_all#1"):
        assert trace.completed(name) is not None
        assert trace.happens_before(f"done:{name}", f"waited:{name}")
    with pytest.raises(LookupError, match="happened 2 times: say which"):
        trace.happens_before("launch:all_to_all", "begin:expert#0")
    with pytest.raises(LookupError, match=r"did not happen; .* names in the trace: all_to_all"):
        trace.order("launch:all_reduce")
    data = trace.as_dict()
    assert (data["kind"], data["version"], data["rank"]) == ("events", 1, rank)
    assert {event["kind"] for event in data["events"]} == {
        "compute", "launch", "wait", "comm", "mark",
    }  # fmt: skip
    chrome = json.loads(json.dumps(trace.chrome_trace()))
    drawn = [each for each in chrome["traceEvents"] if each["ph"] == "X"]
    assert len(drawn) == len(trace.events)
    assert all(each["dur"] >= 0 for each in drawn)
    before = trace.edges
    with trace.mark("outside"):
        dist.barrier()
    assert trace.edges == before
    return True


def test_order_of_launch_compute_and_wait():
    run_ranks(overlapping, 2)


WAITS_AT_ONCE = Mutation(
    "the wait is forgotten",
    "ms_profile.events.work:WorkProxy.wait",
    "self._work.wait(*args, **kwargs)",
    "True",
)
NO_INDEX = Mutation(
    "all launches have one number",
    "ms_profile.events.trace:EventTrace._begin",
    "self._seen[number] += 1",
    "pass",
)


LATENCY, COMPUTE = 0.1, 0.08


def step(early):
    """One communication and one computation; waited for before or after it."""
    x = torch.ones(100)
    dist.barrier()
    with EventTrace() as trace, LinkDelay(latency=LATENCY, group="default_pg"):
        start = time.perf_counter()
        handle = dist.all_reduce(x, async_op=True)
        if early:
            handle.wait()
        with trace.mark("compute"):
            time.sleep(COMPUTE)
        handle.wait()
        elapsed = time.perf_counter() - start
    assert handle.is_completed()
    assert x[0] == dist.get_world_size()
    return elapsed, trace.overlapped("all_reduce", by="compute")


def hidden(rank, world_size):
    elapsed, overlapped = step(early=True)
    assert elapsed >= LATENCY + COMPUTE
    assert overlapped == 0
    # A busy machine only adds to it, so the least of some tries counts.
    elapsed, overlapped = min(step(early=False) for _ in range(6))
    assert LATENCY <= elapsed < LATENCY + COMPUTE
    assert 0 < overlapped < elapsed

    x = torch.ones(1000)
    with EventTrace() as trace, LinkDelay(seconds_per_byte=1e-5):
        start = time.perf_counter()
        y = functional.all_reduce(x, "sum", dist.group.WORLD)
        future = dist.all_reduce(x, async_op=True).get_future()
        y + 1
        functional_s = time.perf_counter() - start
        future.wait()
        queued_s = time.perf_counter() - start
        dist.barrier()
    # 4000 bytes at 2 ranks, twice on the same link.
    assert functional_s >= 0.04
    assert queued_s >= 0.08
    assert trace.completed("all_reduce#1") >= 0.08
    with LinkDelay(latency=5, group="another"):
        dist.all_reduce(x)
    linear = torch.nn.Linear(4, 4)
    model = torch.nn.parallel.DistributedDataParallel(linear)
    with EventTrace(), LinkDelay(latency=0.01):
        model(torch.ones(2, 4)).sum().backward()  # C++ takes the future
    assert torch.equal(linear.weight.grad, torch.full((4, 4), 2.0))
    with LinkDelay(latency=5):
        handle = dist.all_reduce(x, async_op=True)
        assert not handle.is_completed()


def test_a_hidden_communication_costs_the_longer_of_both():
    run_ranks(hidden, 2)


def handles(rank, world_size):
    """Waits, futures, lifetimes, batches, coalescing, errors, DDP: as without a trace."""
    warnings.simplefilter("ignore")
    peer = 1 - rank
    found = {}

    def run(name, body):
        with EventTrace(ops=False, forwards=False) as trace:
            body()
        found[name] = [edge.replace("reduce_scatter", "rs") for edge in trace.edges]

    t = torch.ones(4)

    def future():
        seen = []
        got = dist.all_reduce(t, async_op=True).get_future().then(lambda f: seen.append(f.value()))
        got.wait()
        assert torch.equal(seen[0][0], t)

    def dropped():
        dist.all_reduce(t, async_op=True)
        gc.collect()
        dist.barrier()

    def pair():
        got = torch.zeros(4)
        sent, received = dist.isend(t, peer), dist.irecv(got, peer)
        assert isinstance(received, dist.Work)
        for each in (sent, received):
            each.wait()
        assert received.is_completed()
        assert received._source_rank() == peer
        assert torch.equal(got, t)

    def batch():
        ops = [dist.P2POp(dist.isend, t, peer), dist.P2POp(dist.irecv, torch.zeros(4), peer)]
        for each in dist.batch_isend_irecv(ops):
            each.wait()

    def coalesced():
        with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
            dist.all_reduce(t)
            dist.all_reduce(torch.ones(3))
        manager.wait()

    def any_source():
        if rank:
            dist.send(t, 0)
        else:
            assert dist.recv(torch.zeros(4)) == 1

    def late():
        handle = dist.irecv(torch.zeros(4), peer, tag=9)
        with pytest.raises(RuntimeError, match=r"imed out|[Cc]onnection"):
            handle.wait(timedelta(milliseconds=30))

    linear = torch.nn.Linear(4, 4)

    def ddp():
        model = torch.nn.parallel.DistributedDataParallel(linear)  # C++ waits for broadcasts
        model(torch.ones(2, 4)).sum().backward()
        assert torch.equal(linear.weight.grad, torch.full((4, 4), 2.0))

    def funcol():
        assert torch.equal(functional.all_reduce(t, "sum", dist.group.WORLD) + 0, 2 * t)

    for body in (future, dropped, pair, batch, coalesced, any_source, funcol, ddp):
        run(body.__name__, body)

    with EventTrace() as outer, CommMeter() as meter, EventTrace() as inner:
        dist.all_reduce(t)
    assert outer.edges[-1] == inner.edges[-1] == "waited:all_reduce#0"
    assert len(meter.calls) == 1
    outside = dist.all_reduce(t, async_op=True)
    assert type(outside) is dist.Work
    outside.wait()
    del outer, inner, outside
    run("late", late)  # gloo closes the connection after it
    work.release()
    found["held"] = len(work._held)
    return found


def test_handles_keep_every_behaviour():
    for rank, found in enumerate(run_ranks(handles, 2)):
        # Nobody waits through the handle: C++ or the program took its future, or dropped it.
        assert found["future"] == ["launch:all_reduce#0", "done:all_reduce#0"]
        assert "wait:all_reduce#0" not in found["dropped"]
        assert found["dropped"][-1] == "waited:barrier#0"
        pair = ["launch:send#0", "launch:recv#0"]
        pair += [f"{edge}:{name}#0" for name in ("send", "recv") for edge in ("wait", "waited")]
        assert found["pair"] == found["batch"] == pair
        once = [f"{edge}:all_reduce#0" for edge in ("launch", "wait", "done", "waited")]
        assert sorted(found["coalesced"]) == sorted(once)
        assert found["funcol"] == [once[0], once[1], once[3]]
        assert found["any_source"][-1] == ("waited:send#0" if rank else "waited:recv#0")
        assert "launch:all_reduce#0" in found["ddp"]
        assert {"wait:broadcast#0", "waited:broadcast#0"} <= set(found["ddp"])
        assert found["late"] == ["launch:recv#0", "wait:recv#0"]
        assert found["held"] == 0


@pytest.mark.parametrize(
    ("body", "mutation"),
    [(hidden, WAITS_AT_ONCE), (overlapping, NO_INDEX)],
    ids=["forgotten wait", "one number"],
)
def test_a_wrong_trace_is_caught(body, mutation):
    with pytest.raises((RankError, AssertionError)):
        run_ranks(body, 2, mutate=[mutation])


def test_modules_and_phases():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with EventTrace() as trace:
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
    assert trace.order("begin:Sequential", "begin:Sequential.0", "end:Sequential") == (
        "begin:Sequential",
        "begin:Sequential.0",
        "end:Sequential",
    )
    assert trace.happens_before("end:Sequential.0", "begin:Sequential.1")
    relu = [event for event in trace.events if event.name == "aten.threshold_backward"]
    assert [(event.phase, event.module) for event in relu] == [("backward", "Sequential.1")]
    assert "aten.t" not in {event.name for event in trace.events}  # a view computes nothing
    with EventTrace(ops=False, forwards=False) as trace:
        model(torch.ones(2, 4))
    assert trace.events == ()
    with pytest.raises(RuntimeError, match="is on already"), trace, trace:
        pass


def test_a_module_that_raises_ends_with_what_is_around_it():
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("broken")

    model = torch.nn.Sequential(torch.nn.Identity(), Broken())
    with EventTrace() as trace:
        with pytest.raises(ValueError, match="broken"):
            model(torch.ones(2))
        with pytest.raises(ValueError, match="mine"), trace.mark("mine"):
            raise ValueError("mine")
    assert [edge for edge in trace.edges if edge.startswith("end")][-1] == "end:mine#0"
    begun = {edge.partition(":")[2] for edge in trace.edges if edge.startswith("begin")}
    ended = {edge.partition(":")[2] for edge in trace.edges if edge.startswith("end")}
    assert begun == ended


def test_a_second_use_starts_anew_and_hears_nothing_of_the_first():
    trace = EventTrace(ops=False)
    with fake_world(2):
        with trace:
            early = dist.all_reduce(torch.ones(2), async_op=True)
        with trace:
            late = dist.all_reduce(torch.ones(2), async_op=True)
            early.wait()
            assert "wait:all_reduce#0" not in trace.edges
            late.wait()
    assert trace.order("wait:all_reduce", "launch:all_reduce")[0] == "launch:all_reduce"


def test_union_of_intervals():
    assert union([(0, 2), (1, 3), (5, 9)], 0.5, 6) == 3.5
    assert union([], 0, 1) == 0


def done_at_once(rank, world_size):
    with EventTrace() as trace, LinkDelay(latency=2):
        dist.all_reduce(torch.ones(2), async_op=True)
        for _ in range(20):
            time.sleep(0.02)
    (launch,) = [event for event in trace.events if event.kind == "launch"]
    assert trace.completed("all_reduce") is None
    return launch.end - launch.begin


def test_a_slow_link_does_not_hold_up_the_launch():
    """Of an operation that is over when it is asked for its future."""
    assert run_ranks(done_at_once, 1)[0] < 1


def test_bad_delays():
    with pytest.raises(ValueError, match="negative"):
        LinkDelay(latency=-1)
