"""The window of traced steps: which, where the files are, what is in them, what a failure does."""

import json
import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ms_profile.profiler import Schedule, StepProfiler, kineto, profile
from ms_profile.profiler.collection import Collection
from ms_profile.profiler.labels import GroupLabels
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks


def train(profiler, iterations=range(1, 21)):
    """A loop of 20 steps that marks each of them; returns its numbers."""
    torch.manual_seed(0)
    weight = torch.zeros(16, 16, requires_grad=True)
    losses = []
    with profiler:
        for iteration in iterations:
            profiler.step(iteration)
            with torch.profiler.record_function(f"step_{iteration}"), profiler.mark("forward"):
                loss = (torch.randn(16, 16) @ weight - 1).square().mean()
            loss.backward()
            with torch.no_grad():
                weight -= weight.grad
                weight.grad = None
            losses.append(loss.item())
    return losses


def names(path):
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"]]


def traced_steps(folder):
    """What the loop itself wrote into the trace, in order."""
    (path,) = folder.glob("*.pt.trace.json")
    return [int(n.removeprefix("step_")) for n in names(path) if n.startswith("step_")]


# ---- which steps


@pytest.mark.parametrize(("compat", "expected"), [("megatron", [10, 11]), ("mindspeed", [11, 12])])
def test_exactly_the_asked_steps_are_traced(compat, expected, tmp_path):
    profiler = profile(10, 12, out=tmp_path, compat=compat)
    train(profiler)
    assert traced_steps(tmp_path) == expected
    assert profiler.summary()["steps"] == expected
    assert [n for n in names(profiler.files[0]) if n.startswith("ProfilerStep#")] == [
        f"ProfilerStep#{number}" for number in expected
    ]
    first, stop = expected[0], expected[-1] + 1
    assert [path.name for path in profiler.files] == [
        f"rank0_steps{first}-{stop}.pt.trace.json",
        f"rank0_steps{first}-{stop}.summary.json",
    ]


@pytest.mark.parametrize(
    ("compat", "expected"), [("megatron", [10, 11]), ("mindspeed", [18, 19])]
)  # fmt: skip
def test_after_a_resume_the_printed_iteration_decides(compat, expected, tmp_path):
    train(profile(10, 12, out=tmp_path, compat=compat), range(8, 21))
    assert traced_steps(tmp_path) == expected


STEPS = st.integers(0, 50)


@given(STEPS, st.integers(1, 20), st.integers(0, 5), st.integers(1, 60))
def test_the_schedule_is_its_window(start, length, warmup, first):
    for compat, shift in (("megatron", 0), ("mindspeed", first)):
        schedule = Schedule(start, start + length, warmup, compat)
        phases = {i: schedule.phase(i, first) for i in range(first, 140)}
        window = [i for i, phase in phases.items() if phase == "record"]
        assert window == [i for i in phases if start + shift <= i < start + length + shift]
        warm = [i for i, phase in phases.items() if phase == "warmup"]
        assert warm == [i for i in phases if start + shift - warmup <= i < start + shift]


OFF_BY_ONE = Mutation(
    "off by one",
    "ms_profile.profiler.schedule:Schedule.phase",
    "iteration in window",
    "iteration - 1 in window",
)


def test_a_window_that_is_off_by_one_is_caught(tmp_path):
    count = iter("ab")

    def check():
        folder = tmp_path / next(count)
        train(profile(2, 4, out=folder), range(1, 7))
        assert traced_steps(folder) == [2, 3]

    assert_caught(OFF_BY_ONE, check, by=(AssertionError, ValueError))


def test_the_warm_up_comes_before_the_window_and_is_not_in_it(tmp_path, monkeypatch):
    calls = []
    for method in ("prepare", "begin", "stop"):
        original = getattr(kineto.KinetoBackend, method)

        def noted(self, *args, _original=original, _name=method):
            calls.append((_name, *args))
            return _original(self, *args)

        monkeypatch.setattr(kineto.KinetoBackend, method, noted)
    train(profile(4, 6, warmup=2, out=tmp_path / "warm"), range(1, 9))
    assert calls == [("prepare", 2, 2), ("begin", 4), ("begin", 5), ("stop",)]
    calls.clear()
    train(profile(4, 6, out=tmp_path / "resumed"), range(5, 9))
    assert calls == [("prepare", 0, 1), ("begin", 5), ("stop",)]


def test_training_that_ends_inside_the_window_leaves_what_there_was(tmp_path):
    train(profile(5, 9, out=tmp_path), range(1, 7))
    assert sorted(os.listdir(tmp_path)) == [
        "rank0_steps5-7.pt.trace.json",
        "rank0_steps5-7.summary.json",
    ]
    assert traced_steps(tmp_path) == [5, 6]


@pytest.mark.parametrize(
    ("iterations", "why"),
    [
        (range(1, 4), "ended before"),
        (range(1, 5), "ended before"),  # in the warm-up
        (range(30, 33), "began at 30"),
        ((), "no iteration ran"),
    ],
)
def test_a_window_that_never_comes_is_said(iterations, why, tmp_path, caplog):
    train(profile(5, 9, out=tmp_path), iterations)
    assert os.listdir(tmp_path) == []
    (message,) = caplog.messages
    assert why in message
    train(profile(2, 3, out=tmp_path), range(1, 4))  # nothing was left on
    assert traced_steps(tmp_path) == [2]


# ---- what is in the files


def test_own_times_of_the_operators_sum_to_the_step(tmp_path):
    profiler = profile(2, 4, out=tmp_path, shapes=True, memory=True)
    x = torch.randn(300, 300)
    with profiler:
        for iteration in range(1, 5):
            profiler.step(iteration)
            for _ in range(20):
                x @ x
    summary = json.loads(profiler.files[1].read_text())
    assert summary == profiler.summary()
    assert (summary["kind"], summary["version"], summary["backend"]) == ("summary", 1, "torch")
    rows = summary["operators"]
    (steps,) = (row for row in rows if row["name"].startswith("ProfilerStep"))
    assert sum(row["self_us"] for row in rows) == pytest.approx(steps["total_us"], rel=0.01)
    assert steps["total_us"] == pytest.approx(1e6 * sum(summary["seconds"]), rel=0.05)
    (product,) = (row for row in rows if row["name"] == "aten::mm")
    assert product["calls"] == 40
    assert product["shapes"][:2] == [[300, 300], [300, 300]]
    assert product["self_bytes"] == 40 * 4 * 300 * 300
    assert rows == sorted(rows, key=lambda row: -row["self_us"])


def test_existing_results_stay(tmp_path):
    for _ in range(2):
        train(profile(2, 3, out=tmp_path), range(1, 4))
    assert sorted(os.listdir(tmp_path)) == [
        "rank0_steps2-3.1.pt.trace.json",
        "rank0_steps2-3.1.summary.json",
        "rank0_steps2-3.pt.trace.json",
        "rank0_steps2-3.summary.json",
    ]
    # How TensorBoard reads them: one worker, whose second trace has a number.
    pattern = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")
    found = [pattern.match(name) for name in sorted(os.listdir(tmp_path))]
    assert [m.groups() for m in found if m] == [("rank0_steps2-3", ".1"), ("rank0_steps2-3", None)]


def test_marks_are_in_the_trace_and_cost_nothing_outside(tmp_path):
    profiler = profile(2, 3, out=tmp_path)
    train(profiler, range(1, 5))
    assert names(profiler.files[0]).count("forward") == 1


def test_a_function_of_the_users_gets_torchs_profiler(tmp_path):
    seen = []
    profiler = profile(2, 3, out=tmp_path, on_ready=seen.append)
    train(profiler, range(1, 4))
    assert isinstance(seen[0], torch.profiler.profile)
    assert [path.name for path in profiler.files] == ["rank0_steps2-3.summary.json"]


# ---- ranks


def collectives(rank, world_size, folder):
    """Three steps with collectives of two groups; which rows name which group."""
    group = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    profiler = profile(2, 3, out=f"{folder}/some", ranks=[1])
    labelled = profile(2, 3, out=f"{folder}/all", level=1)
    for each in (profiler, labelled):
        with each:
            for iteration in range(1, 4):
                each.step(iteration)
                x = torch.ones(3)
                dist.all_reduce(x, group=group)
                dist.all_gather([torch.empty(3), torch.empty(3)], x)
                torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name)
    return profiler.backend, [path.name for path in profiler.files]


def test_asked_ranks_write_and_collectives_carry_their_group(tmp_path):
    zero, one = run_ranks(collectives, 2, str(tmp_path))
    assert zero == ("none", [])
    assert one[1] == ["rank1_steps2-3.pt.trace.json", "rank1_steps2-3.summary.json"]
    assert sorted(os.listdir(tmp_path / "some")) == sorted(one[1])
    for rank in range(2):
        path = tmp_path / "all" / f"rank{rank}_steps2-3.pt.trace.json"
        rows = [name for name in names(path) if name.endswith("]")]
        assert rows.count("allreduce [TENSOR_MODEL_PARALLEL_GROUP]") == 1
        assert rows.count("all_reduce [TENSOR_MODEL_PARALLEL_GROUP]") == 1
        assert rows.count("allgather [default_pg]") == 1
        facts = json.loads(path.read_text())["distributedInfo"]
        assert (facts["rank"], facts["world_size"]) == (rank, 2)
        assert "TENSOR_MODEL_PARALLEL_GROUP" in {g["pg_desc"] for g in facts["pg_config"]}


@pytest.mark.parametrize(
    ("ranks", "traced"),
    [("all", 4), ([-1], 4), ([0, 3], 2), ([2, -1], 4), (lambda rank: rank % 2 == 0, 2)],
)
def test_ranks(ranks, traced, tmp_path):
    made = [profile(1, 2, ranks=ranks, rank=r, world_size=4, out=tmp_path) for r in range(4)]
    assert sum(each.backend == "torch" for each in made) == traced


# ---- bad input


BAD = [
    ({"start": 5, "stop": 5}, ValueError, r"stop=5 must be greater than start=5"),
    ({"start": 5, "stop": 4}, ValueError, r"stop=4 must be greater than start=5"),
    ({"start": -1, "stop": 4}, ValueError, "start must not be negative"),
    ({"start": 1.5, "stop": 4}, TypeError, "start must be an integer"),
    ({"start": True, "stop": 4}, TypeError, "start must be an integer"),
    ({"warmup": -1}, ValueError, "warmup must not be negative"),
    ({"level": 3}, ValueError, "level must be 0, 1 or 2"),
    ({"memory": True, "cpu": False}, ValueError, "memory=True .* give cpu=True"),
    ({"stack": True, "cpu": False}, ValueError, "stack=True .* give cpu=True"),
    ({"shapes": True, "cpu": False}, ValueError, "shapes=True .* give cpu=True"),
    ({"cpu": False, "device": False}, ValueError, "nothing to record"),
    ({"backend": "nsys"}, ValueError, "backend must be one of"),
    ({"backend": "npu"}, ValueError, "torch_npu, which is not installed"),
    ({"on_ready": "db"}, TypeError, "on_ready must be"),
    ({"analyse": "soon"}, ValueError, "analyse must be"),
    ({"compat": "other"}, ValueError, "compat must be"),
    ({"ranks": [4], "rank": 0, "world_size": 4}, ValueError, "ranks names rank 4"),
    ({"ranks": [-2], "rank": 0, "world_size": 4}, ValueError, "ranks names rank -2"),
    ({"ranks": []}, ValueError, "ranks is empty"),
    ({"ranks": "dp0"}, TypeError, "ranks must be 'all'"),
    ({"ranks": [0.0]}, TypeError, "ranks must hold integers"),
    ({"rank": 4, "world_size": 4}, ValueError, "rank=4 is not one of the 4 ranks"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_input_is_an_error_at_once(arguments, error, text, tmp_path, monkeypatch):
    if arguments.get("backend") == "npu":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(error, match=text):
        profile(**{"start": 10, "stop": 12, "out": tmp_path / "out", **arguments})
    assert os.listdir(tmp_path) == []


def test_an_unwritable_path_is_an_error_at_the_start_where_it_matters(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file"):
            profile(1, 2, out=out)
    other = profile(1, 2, out=tmp_path / "file", ranks=[1], rank=0, world_size=2)
    assert len(train(other, range(1, 4))) == 3


# ---- failures after the start


def fails(*_, **__):
    raise OSError("No space left on device")


@pytest.mark.parametrize("where", ["prepare", "begin", "end", "stop", "export", "operators"])
def test_a_failure_is_logged_once_and_changes_no_number(where, tmp_path, monkeypatch, caplog):
    plain = train(profile(2, 4, backend="none"), range(1, 9))
    monkeypatch.setattr(kineto.KinetoBackend, where, fails)
    profiler = profile(2, 4, out=tmp_path)
    assert train(profiler, range(1, 9)) == plain
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "training goes on: OSError: No space left on device" in record.getMessage()
    assert isinstance(profiler.failure, OSError)
    assert profiler.summary() is None or where == "export"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    # Nothing of it is left on: the next profiler works.
    monkeypatch.undo()
    train(profile(2, 3, out=tmp_path / "next"), range(1, 4))
    assert traced_steps(tmp_path / "next") == [2]


def test_a_folder_that_vanishes_is_such_a_failure(tmp_path, caplog):
    profiler = profile(2, 4, out=tmp_path / "out")
    (tmp_path / "out").rmdir()
    assert train(profiler, range(1, 9)) == train(profile(2, 4, backend="none"), range(1, 9))
    assert len(caplog.records) == 1


def test_beside_another_profiler_it_gives_up_and_leaves_that_one_alone(tmp_path, caplog):
    plain = train(profile(2, 4, backend="none"), range(1, 9))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        assert train(profile(2, 4, out=tmp_path), range(1, 9)) == plain
    assert len(caplog.records) == 1
    assert "aten::mm" in {row.key for row in other.key_averages()}


def test_another_profiler_inside_the_window_ends_the_trace(tmp_path, caplog):
    with profile(2, 4, out=tmp_path) as profiler:
        for iteration in range(1, 6):
            profiler.step(iteration)
            if iteration == 2:
                with torch.profiler.profile() as other:
                    torch.ones(3)
    assert "aten::ones" in {row.key for row in other.key_averages()}
    assert "which ended this one" in caplog.text
    assert os.listdir(tmp_path) == []


def test_a_profiler_is_entered_once(tmp_path):
    profiler = profile(2, 3, out=tmp_path)
    train(profiler, range(1, 4))
    with pytest.raises(RuntimeError, match="make another one"):
        profiler.__enter__()


def test_compiled_regions_stay_compiled_while_groups_are_named():
    compiled, runs = [], []

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*arguments):
            runs.append(len(arguments))
            return graph(*arguments)

        return run

    double = torch.compile(lambda x: x * 2, backend=backend)
    double(torch.ones(2))
    with GroupLabels():
        assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert (len(compiled), len(runs)) == (1, 2)


def test_tracing_changes_no_number(tmp_path):
    plain = train(profile(2, 4, backend="none"), range(1, 9))
    options = {"level": 1, "memory": True, "stack": True, "shapes": True}
    assert train(profile(2, 4, out=tmp_path, **options), range(1, 9)) == plain


# ---- Megatron's arguments


def arguments(folder, **changed):
    return SimpleNamespace(
        **{
            "profile_step_start": 10,
            "profile_step_end": 12,
            "profile_ranks": [-1],
            "profile_save_path": str(folder),
            **changed,
        }
    )


def test_from_megatron_reads_the_flags(tmp_path):
    args = arguments(
        tmp_path,
        profile_level="level2",
        profile_with_cpu=True,
        profile_with_memory=True,
        profile_with_stack=True,
        profile_record_shapes=True,
    )
    made = StepProfiler.from_megatron(args, compat="mindspeed")
    assert made.schedule == Schedule(10, 12, 1, "mindspeed")
    assert made.collection == Collection(2, memory=True, stack=True, shapes=True)
    assert made.folder == tmp_path


def test_from_megatron_where_the_cpu_is_the_device(tmp_path, caplog):
    profiler = StepProfiler.from_megatron(arguments(tmp_path))
    assert "the CPU is the device" in caplog.text
    train(profiler)
    assert traced_steps(tmp_path) == [10, 11]


def test_from_megatron_refuses_what_the_flags_cannot_mean(tmp_path):
    for changed, text in (
        ({"profile_level": "level3"}, "profile_level must be"),
        ({"profile_with_memory": True}, "give cpu=True"),
        ({"profile_step_end": 10}, "must be greater"),
        ({"profile_ranks": [1]}, "ranks names rank 1"),
    ):
        with pytest.raises(ValueError, match=text):
            StepProfiler.from_megatron(arguments(tmp_path, **changed))
