"""The NPU backend against the recorded signatures of torch_npu: every call, in order, no device."""

import sys

import pytest
import torch

from ms_profile.profiler import profile
from support import npu_profiler
from support.mutation import Mutation, assert_caught
from support.npu_profiler import FakeProfile


@pytest.fixture(autouse=True)
def _torch_npu(monkeypatch):
    for name, module in npu_profiler.fake().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    yield
    sys.modules.pop("ms_profile.profiler.npu", None)  # it holds the stand-in


def run(folder, iterations, **options):
    with profile(3, 5, backend="npu", out=folder, **options) as profiler:
        for iteration in iterations:
            profiler.step(iteration)
    assert profiler.failure is None, profiler.failure
    (made,) = FakeProfile.made
    return profiler, made


FOLDER = "rank0_steps3-5_7_20260101_ascend_pt"


def test_a_window_with_a_warm_up(tmp_path):
    profiler, made = run(tmp_path, range(1, 8))
    assert made.plan == ["WARMUP", "RECORD", "RECORD_AND_SAVE"]
    # Started in iteration 2, a step each for 3 and 4, and one that saves.
    assert made.steps[:4] == ["step"] * 4
    assert not made.ended_early
    assert [path.name for path in profiler.files] == [FOLDER, "rank0_steps3-5.summary.json"]
    assert made.metadata["ms_profile"]["window"] == [3, 5]
    assert profiler.summary()["steps"] == [3, 4]
    assert (profiler.summary()["backend"], profiler.summary()["operators"]) == ("npu", [])


@pytest.mark.parametrize(
    ("iterations", "plan", "early"),
    [
        (range(4, 8), ["RECORD_AND_SAVE"], False),
        (range(3, 8), ["RECORD", "RECORD_AND_SAVE"], False),
        (range(1, 4), ["WARMUP", "RECORD", "RECORD_AND_SAVE"], True),
    ],
)
def test_resumed_inside_and_ended_inside(iterations, plan, early, tmp_path):
    profiler, made = run(tmp_path, iterations)
    assert made.plan == plan
    assert made.ended_early is early
    assert profiler.files[0].name == FOLDER


@pytest.mark.parametrize(
    ("level", "metrics"), [(0, "AiCoreNone"), (1, "PipeUtilization"), (2, "PipeUtilization")]
)
def test_levels_and_what_is_recorded(level, metrics, tmp_path):
    _, made = run(tmp_path, range(1, 8), level=level, memory=True, stack=True, shapes=True)
    given = made.call.arguments
    assert [each.name for each in given["activities"]] == ["NPU", "CPU"]
    assert given["profile_memory"] and given["with_stack"] and given["record_shapes"]  # noqa: PT018
    config = given["experimental_config"].arguments
    assert config["profiler_level"].name == f"Level{level}"
    assert config["aic_metrics"].name == metrics
    assert config["l2_cache"] is False


def test_the_device_alone_is_the_default_of_the_flags(tmp_path):
    _, made = run(tmp_path, range(1, 8), cpu=False)
    assert [each.name for each in made.call.arguments["activities"]] == ["NPU"]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, (True, False)),
        ({"analyse": "async"}, (True, True)),
        ({"analyse": "later"}, (False, False)),
        ({"on_ready": lambda profiler: None}, (False, False)),
    ],
)
def test_when_torch_npu_parses(options, flags, tmp_path, monkeypatch):
    seen = []
    library = sys.modules["torch_npu.profiler"]
    original = library.tensorboard_trace_handler

    def handler(**arguments):
        seen.append((arguments["analyse_flag"], arguments["async_mode"]))
        return original(**arguments)

    monkeypatch.setattr(library, "tensorboard_trace_handler", handler)
    run(tmp_path, range(1, 8), **options)
    assert seen == [flags]


def test_auto_takes_the_npu_where_there_is_one(tmp_path, monkeypatch):
    class Npu:
        is_available = staticmethod(lambda: True)

    monkeypatch.setattr(torch, "npu", Npu, raising=False)
    assert profile(1, 2, out=tmp_path).backend == "npu"


MISSPELT = Mutation(
    "misspelt", "ms_profile.profiler.npu:settings", '"record_shapes"', '"record_shape"'
)
SAVES_TWICE = Mutation(
    "no last step",
    "ms_profile.profiler.npu:NpuBackend.stop",
    "self._steps_left == 0",
    "False",
)


@pytest.mark.parametrize("mutation", [MISSPELT, SAVES_TWICE], ids=lambda m: m.name)
def test_wrong_calls_are_caught(mutation, tmp_path):
    count = iter("ab")

    def check():
        FakeProfile.made.clear()
        _, made = run(tmp_path / next(count), range(1, 8))
        assert not made.ended_early

    assert_caught(mutation, check)
