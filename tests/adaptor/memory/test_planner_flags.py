"""What the planner's flags mean, what they need, and what they do not go with."""

import re
from collections import ChainMap

import pytest

import mindspeed
from mindspeed.features import load_table
from mindspeed.features.memory.planner.flight import held, in_flight
from mindspeed.features.memory.planner.rules import check
from mindspeed.features.memory.planner.settings import Budget, settings
from mindspeed.patching.config import Config
from mindspeed.patching.errors import PlanError
from mindspeed.patching.rules import broken_rules

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("60GiB", "bytes", 60 * GIB),
        ("1.5 GiB", "bytes", 3 * GIB // 2),
        ("512MB", "bytes", 512_000_000),
        ("1073741824", "bytes", GIB),
        ("60%", "peak", 0.6),
        ("0.9", "device", 0.9),
    ],
)
def test_a_budget(text, kind, amount):
    assert Budget.parse(text) == Budget(kind, amount, text)


@pytest.mark.parametrize(
    "text", ["", "much", "0", "-1GiB", "0%", "101%", "1.5", "60 GiX", "0.5GiB%"]
)
def test_no_budget(text):
    with pytest.raises(ValueError, match=r"--memory-budget: got .* need bytes with a unit"):
        Budget.parse(text)


SIZE = {"adaptive_recompute_device_size": 512}
RECOMPUTE, BOTH = ("discard", "recompute"), ("discard", "recompute", "swap")


@pytest.mark.parametrize(
    ("values", "kind", "amount", "actions", "steps"),
    [
        ({"memory_budget": "2GiB"}, "bytes", 2 * GIB, None, 2),
        ({"memory_budget": "50%", "memory_actions": "keep, swap"}, "peak", 0.5, ("swap",), 2),
        (SIZE, "bytes", 512 << 20, RECOMPUTE, 7),
        ({"adaptive_recompute_device_swap": True}, "free", 0.0, RECOMPUTE, 7),
        ({**SIZE, "adaptive_recompute_device_swap": True}, "bytes", 512 << 20, RECOMPUTE, 7),
        ({"adaptive_memory_optimization": True}, "free", 0.0, BOTH, 7),
        ({"smart_swap": True}, "free", 0.0, ("swap",), 7),
        ({**SIZE, "adaptive_recompute_profiling_step": 4}, "bytes", 512 << 20, RECOMPUTE, 1),
        ({**SIZE, "adaptive_recompute_profiling_step": 0}, "bytes", 512 << 20, RECOMPUTE, 7),
    ],
)
def test_every_flag_is_one_planner(values, kind, amount, actions, steps):
    found = settings(values)
    assert (found.budget.kind, found.budget.amount) == (kind, amount)
    assert (found.actions, found.steps, found.streaming) == (
        actions,
        steps,
        bool(values.get("smart_swap")),
    )


def test_nothing_is_planned_unasked():
    assert settings({}) is None
    assert "memory.planner" not in mindspeed.plan({}, 2).features


def test_pins():
    found = settings({"memory_budget": "1GiB", "memory_pins": "layers.0=keep, *.mlp=recompute"})
    assert found.pins == (("layers.0", "keep"), ("*.mlp", "recompute"))


@pytest.mark.parametrize(
    "values",
    [
        {"memory_budget": "much"},
        {"memory_budget": "1GiB", "memory_actions": "keep,forget"},
        {"memory_budget": "1GiB", "memory_pins": "layers.0"},
        {"memory_budget": "1GiB", "memory_pins": "layers.0=drop"},
    ],
)
def test_malformed(values):
    with pytest.raises(ValueError, match=r"^--memory-(budget|actions|pins): got .*, need "):
        check(values, "npu")


def test_shares_of_a_device_need_one():
    check({"memory_budget": "0.9"}, "npu")
    with pytest.raises(ValueError, match=r"a budget of 0.9 on the processor.* --memory-budget 60%"):
        check({"memory_budget": "0.9"}, "cpu")


def test_swapping_alone_needs_a_device(monkeypatch):
    values = {"memory_budget": "1GiB", "memory_actions": "swap"}
    check(values, "npu")
    with pytest.raises(ValueError, match=r"swapping alone .* --memory-actions recompute,swap"):
        check(values, "cpu")
    monkeypatch.setenv("MS_MEMORY_SIM", "1")
    check(values, "cpu")


PLANNED = {"memory_budget": "1GiB"}
ROWS = {
    "--recompute-granularity": {**PLANNED, "recompute_granularity": "full"},
    "--recompute-activations": {**PLANNED, "recompute_activations": True},
    "--moe-layer-recompute": {**PLANNED, "moe_layer_recompute": True},
    "--recompute-activation-function": {**PLANNED, "recompute_activation_function": True},
    "--recompute-norm": {**PLANNED, "recompute_norm": True},
    "--swap-attention": {**PLANNED, "swap_attention": True},
    "--swap-layer-input": {**PLANNED, "swap_layer_input": True},
    "--distribute-saved-activations": {**PLANNED, "distribute_saved_activations": True},
    "--cpu-offloading-num-layers": {**PLANNED, "cpu_offloading_num_layers": 1},
    "--fine-grained-activation-offloading": {**PLANNED, "fine_grained_activation_offloading": True},
    "--cuda-graph-impl": {**PLANNED, "cuda_graph_impl": "local"},
    "--overlap-moe-expert-parallel-comm": {**PLANNED, "overlap_moe_expert_parallel_comm": True},
    "--hybrid-context-parallel": {**PLANNED, "hybrid_context_parallel": True},
    "--fp8-format": {**PLANNED, "fp8": "hybrid"},
    "--use-legacy-models": {**PLANNED, "use_legacy_models": True},
    "--adaptive-memory-optimization": {**SIZE, "adaptive_memory_optimization": True},
    "--smart-swap": {**SIZE, "smart_swap": True},
    "--adaptive-memory-optimization with --smart-swap": {
        "smart_swap": True,
        "adaptive_memory_optimization": True,
    },
    "--memory-budget with a flag that is an older name": {**PLANNED, **SIZE},
}


def problems(values, device="npu"):
    """What the planner's rules say of a configuration; `mindspeed.plan` raises it."""
    table = load_table()
    (feature,) = [f for f in table.features if f.name == "memory.planner"]
    context = {"device": device, "level": 2}
    return list(broken_rules(feature, ChainMap(context, Config(values, table.defaults))))


@pytest.mark.parametrize("named", ROWS)
def test_conflicts(named):
    (problem,) = problems(ROWS[named])
    assert re.search(f"E-M11: .*{named}.*: .*(Leave|Give|Keep) ", problem)


def test_a_conflict_ends_the_plan():
    with pytest.raises(PlanError, match=r"E-M11: .*--recompute-norm"):
        mindspeed.plan(ROWS["--recompute-norm"], 2, device="npu")


NEEDS = {
    "--memory-actions says .* Give --memory-budget": {"memory_actions": "swap"},
    "--memory-pins says .* Give --memory-budget": {"memory_pins": "layers.0=keep"},
    "--adaptive-recompute-device-size must be": {"adaptive_recompute_device_size": 0},
    "--adaptive-recompute-profiling-step says": {"adaptive_recompute_profiling_step": 5},
    "-profiling-step lies beyond .* up to --train-iters": {
        **SIZE,
        "adaptive_recompute_profiling_step": 50,
        "train_iters": 20,
    },
    "could be left over .* Give --memory-budget": {"adaptive_recompute_device_swap": True},
    "left over .* Give --memory-budget": {"smart_swap": True},
    "be left over .* Give --memory-budget": {"adaptive_memory_optimization": True},
}


@pytest.mark.parametrize("text", NEEDS)
def test_a_flag_that_cannot_act_is_an_error(text):
    (problem,) = problems(NEEDS[text], "cpu")
    assert re.search(text, problem)


def test_level_1_has_no_planner():
    with pytest.raises(PlanError, match=r"--memory-budget .*level 2"):
        mindspeed.plan(PLANNED, 1)


def test_micro_batches_in_flight():
    assert in_flight(1, 0, 1, 8) == (1,)
    assert [in_flight(4, stage, 1, 8) for stage in range(4)] == [(4,), (3,), (2,), (1,)]
    assert in_flight(4, 0, 1, 2) == (2,)
    assert in_flight(2, 1, 2, 2) == (2, 1)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [2, 3])
def test_micro_batches_in_flight_of_virtual_stages(stages, chunks):
    """In all as many as the warm-up and one more; the most of each chunk at its own time."""
    for stage in range(stages):
        moments = held(stages, stage, chunks, 4 * stages, stages)
        assert max(map(sum, moments)) == 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
        assert min(map(min, moments)) >= 0
        most = in_flight(stages, stage, chunks, 4 * stages)
        assert most == tuple(max(m[chunk] for m in moments) for chunk in range(chunks))
