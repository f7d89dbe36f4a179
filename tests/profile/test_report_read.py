"""Sums over a trace, against torch's own and against plain arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, schedule

from ms_profile.report import intervals, names
from ms_profile.report.trace import read_trace
from support.mutation import Mutation, assert_caught
from support.traces import gpu_trace, host_event, write_trace

US = pytest.approx
TRACE = "ms_profile.report.trace"

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple))


def moments(spans):
    return {moment for begin, end in spans for moment in range(begin, end)}


@given(SPANS, SPANS)
@settings(max_examples=50, deadline=10_000)
def test_interval_sets_are_sets_of_moments(first, second):
    one, two = intervals.union(first), intervals.union(second)
    assert moments(one) == moments(first)
    assert intervals.length(one) == len(moments(first))
    left = intervals.subtract(one, two)
    assert moments(left) == moments(first) - moments(second)
    assert left == intervals.union(left)
    cover = intervals.Cover(two)
    assert cover.outside(one) == len(moments(first) - moments(second))
    assert cover.within((5, 30)) == len(moments(second) & set(range(5, 30)))
    assert moments(intervals.clip(one, (10, 20))) == moments(first) & set(range(10, 20))


def test_nested_events_share_out_their_thread():
    events = [(0, 1000, 0), (100, 400, 1), (150, 250, 2), (500, 600, 1), (1200, 1300, 0)]
    own = {}
    for node in intervals.nest(reversed(events)):
        own.setdefault(node.name, []).append(intervals.length(node.own))
    assert own == {2: [100], 1: [200, 100], 0: [600, 100]}


def check_gpu_trace(tmp_path):
    for rank in (0, 1):
        path = write_trace(tmp_path / f"rank{rank}_steps10-12.pt.trace.json", gpu_trace(rank))
        found = read_trace(path, rank)
        assert (found.steps, found.source) == (2, "device")
        kinds = {name: round(value * 1e6) for name, value in vars(found.kinds).items()}
        assert kinds == {
            "total_s": 921,
            "compute_s": 600 + 60 * rank,
            "communication_s": 200,
            "exposed_communication_s": 90 - 20 * rank,
            "copy_s": 20,
            "exposed_copy_s": 20,
            "idle_s": 211 - 40 * rank,
        }
        (comm,) = found.comm_times
        assert (comm.group, comm.op, comm.calls, comm.bytes) == ("dp", "all_reduce", 2, 2 * 4096)
        assert comm.exposed_s * 1e6 == US(90 - 20 * rank)


def test_kinds_of_time_on_a_device(tmp_path):
    check_gpu_trace(tmp_path)


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "overlap ignored", "ms_profile.report.trace:_kinds", "subtract(comm, compute)", "comm"
        ),
        Mutation(
            "streams added up", "ms_profile.report.trace:_summary", "union(intervals)", "intervals"
        ),
        Mutation(
            "both ways counted",
            "ms_profile.report.collect:_transfer",
            "item * max",
            "2 * item * max",
        ),
    ],
    ids=lambda mutation: mutation.name,
)
def test_wrong_sums_are_noticed(tmp_path, mutation):
    if mutation.name == "streams added up":
        # Two streams that compute at once are one busy device.
        def check():
            trace = gpu_trace()
            trace["traceEvents"] += [
                {**e, "tid": 8} for e in trace["traceEvents"] if e["cat"] == "kernel"
            ]
            path = write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", trace)
            assert read_trace(path, 0).kinds.compute_s * 1e6 == US(600)

        assert_caught(mutation, check)
    else:
        assert_caught(mutation, lambda: check_gpu_trace(tmp_path))


def test_a_thread_of_the_host_does_what_its_innermost_event_says(tmp_path):
    trace = [
        host_event("aten::linear", 0, 100),
        host_event("c10d::allreduce_", 20, 30),
        host_event("aten::copy_", 60, 10),
        host_event("gloo:all_reduce", 25, 115, tid=11, category="user_annotation"),
        host_event("forward", 100, 60, category="user_annotation"),
    ]
    found = read_trace(write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", trace), 0)
    kinds = {name: round(value * 1e6) for name, value in vars(found.kinds).items()}
    assert kinds["compute_s"] == 60
    assert kinds["communication_s"] == 120  # 20-140 on two threads
    assert kinds["exposed_communication_s"] == 120 - 40
    assert kinds["copy_s"] == 10
    assert kinds["exposed_copy_s"] == 0
    assert kinds["idle_s"] == 160 - 60 - 80
    (comm,) = found.comm_times
    assert (comm.op, comm.calls, round(comm.exposed_s * 1e6)) == ("all_reduce", 1, 115 - 40)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A trace and what torch itself says of the same window."""
    path = tmp_path_factory.mktemp("run") / "rank0_steps2-4.pt.trace.json.gz"
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = torch.randn(4, 8)
    averages = []

    def ready(profiler):
        profiler.export_chrome_trace(str(path))
        averages.extend(profiler.key_averages())

    with profile(
        activities=[ProfilerActivity.CPU],
        profile_memory=True,
        with_stack=True,
        schedule=schedule(wait=0, warmup=1, active=2),
        on_trace_ready=ready,
        acc_events=True,
    ) as profiler:
        for _ in range(3):
            model(x).sum().backward()
            profiler.step()
    return path, averages


def test_a_label_gives_its_group_to_the_communication_that_follows(tmp_path):
    notes = {"category": "user_annotation"}
    trace = [
        host_event("allreduce_ [dp]", 0, 10, **notes),
        host_event("allreduce_ [tp]", 12, 10, **notes),
        host_event("_allgather_base [tp]", 30, 5, **notes),
        host_event("gloo:all_reduce", 5, 20, tid=11, **notes),
        host_event("gloo:all_gather", 40, 5, tid=11, **notes),
        host_event("gloo:all_reduce", 30, 30, tid=12, **notes),
        host_event("reduce_scatter_tensor_coalesced [dp]", 62, 2, **notes),
        host_event("gloo:all_reduce", 66, 3, tid=11, **notes),
        host_event("gloo:all_reduce", 70, 10, tid=12, **notes),
    ]
    found = read_trace(write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", trace), 0)
    times = {(row.group, row.op): round(row.time_s * 1e6) for row in found.comm_times}
    assert times == {
        ("dp", "all_reduce"): 20,
        ("tp", "all_reduce"): 30,
        ("tp", "all_gather"): 5,
        ("dp", "reduce_scatter"): 3,
        ("", "all_reduce"): 10,
    }


def test_calls_of_the_host_do_not_count_beside_kernels(tmp_path):
    trace = gpu_trace()
    call = host_event("nccl:all_reduce", 1010, 5, category="user_annotation")
    trace["traceEvents"].append(call)
    found = read_trace(write_trace(tmp_path / "rank0_steps1-2.pt.trace.json", trace), 0)
    assert [(row.group, row.calls) for row in found.comm_times] == [("dp", 2)]
    assert found.world_size == 2
    assert found.iterations == (10, 11)


def check_operators(traced):
    path, averages = traced
    found = {row.name: row for row in read_trace(path, 0).operators}
    wanted = {row.key: row for row in averages}
    assert "aten::addmm" in found
    assert {n for n in wanted if n.startswith("aten::")} <= set(found) <= set(wanted)
    for name, row in found.items():
        own, total = wanted[name].self_cpu_time_total, wanted[name].cpu_time_total
        assert row.calls == wanted[name].count
        # Each event's begin and end are rounded to a nanosecond in the file.
        assert row.self_s * 1e6 == pytest.approx(own, abs=0.02 * row.calls), name
        assert row.total_s * 1e6 == pytest.approx(total, abs=0.004 * row.calls), name


def test_operators_are_those_of_key_averages(traced):
    check_operators(traced)


def test_self_time_without_children_left_out_is_noticed(traced):
    assert_caught(
        Mutation(
            "own time whole", f"{TRACE}:_Host._add", "length(node.own)", "node.end - node.begin"
        ),
        lambda: check_operators(traced),
    )


def test_modules_and_memory_of_a_trace(traced):
    found = read_trace(traced[0], 0)
    modules = {row.module: row for row in found.modules}
    assert {name: row.calls for name, row in modules.items()} == {
        "Sequential_0": 2,
        "Linear_0": 2,
        "GELU_0": 2,
        "Linear_1": 2,
    }
    parts = sum(row.total_s for name, row in modules.items() if name != "Sequential_0")
    whole = modules["Sequential_0"]
    assert whole.total_s == pytest.approx(whole.self_s + parts, abs=1e-7)
    # Both activations and what GELU saves, at least.
    assert found.memory.bytes >= 4 * (2 * 4 * 16 + 4 * 8)
    assert found.steps == 2
    assert found.source == "host"


@pytest.mark.parametrize(
    ("spelled", "common"),
    [
        ("gloo:all_reduce", "all_reduce"),
        ("nccl:_reduce_scatter_base", "reduce_scatter"),
        ("hcom_allGather__123_0", "all_gather"),
        ("ncclDevKernel_SendRecv", "send"),
        ("alltoall_base", "all_to_all"),
        ("nccl:reduce", "reduce"),
        ("something", "something"),
    ],
)
def test_names_of_collectives(spelled, common):
    assert names.collective(spelled) == common
