"""What recomputed activations and norms cannot be combined with, and what the flags mean."""

import copy
import pickle
from types import SimpleNamespace

import pytest

import mindspeed
from mindspeed.features.memory import settings
from mindspeed.features.memory.recompute import feature
from mindspeed.features.memory.settings import MemorySettings
from mindspeed.train.args import parse
from mindspeed.train.validate import check

NORM = {"recompute_norm": True}
ACT = {"recompute_activation_function": True}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
UNIFORM = {**FULL, "recompute_method": "uniform"}
BLOCK = {**FULL, "recompute_method": "block"}
VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
DIVIDED = {"distribute_saved_activations": True}
BUBBLE = {**VIRTUAL, "recompute_in_bubble": True}
ADVANCE = {**VIRTUAL, **BLOCK, "recompute_in_advance": True}

REFUSED = [
    ({**ACT, **UNIFORM}, "E-M12: --recompute-activation-function with --recompute-method uniform"),
    ({**NORM, **UNIFORM}, "E-M12: --recompute-norm with --recompute-method uniform"),
    (
        {**ACT, "recompute_granularity": "selective"},
        "E-M12: --recompute-activation-function with --recompute-granularity selective",
    ),
    (
        {**NORM, "recompute_granularity": "selective"},
        "E-M12: --recompute-norm with --recompute-granularity selective",
    ),
    ({**ACT, "moe_shared_expert_overlap": True}, "E-M12: .* with --moe-shared-expert-overlap"),
    ({**ACT, "activation_func_fp8_input_store": True}, "E-M12: .* cannot be computed from"),
    ({**NORM, "fp8": "hybrid"}, "E-M12: .* with --fp8-format"),
    ({**ACT, **DIVIDED}, "E-M17: --recompute-activation-function with --distribute-saved"),
    ({**NORM, **DIVIDED}, "E-M17: --recompute-norm with --distribute-saved-activations"),
    ({**NORM, "cpu_offloading": True}, "E-M18: --recompute-norm with Megatron's activation off"),
    (
        {**ACT, "fine_grained_activation_offloading": True},
        "E-M18: --recompute-activation-function with Megatron's activation offloading",
    ),
    ({**DIVIDED, "sequence_parallel": True}, "E-M17: .* with --sequence-parallel"),
    ({**DIVIDED, **BUBBLE}, "E-M17: --distribute-saved-activations with --recompute-in-bubble"),
    ({"recompute_in_bubble": True}, "E-M19: .* with one pipeline stage, or without virtual"),
    (
        {"recompute_in_bubble": True, "pipeline_model_parallel_size": 2},
        "E-M19: .* without virtual ones",
    ),
    ({**BUBBLE, "swap_attention": True}, "E-M19: .* with --swap-attention"),
    ({**BUBBLE, "adaptive_memory_optimization": True}, "E-M19: .* with a planned memory budget"),
    ({**BUBBLE, **BLOCK}, "E-M19: --recompute-in-bubble with --recompute-granularity"),
    ({**BUBBLE, "recompute_in_advance": True}, "E-M19: .* with --recompute-in-advance"),
    ({**ADVANCE, "recompute_method": "uniform"}, "E-M19: .* with --recompute-method uniform"),
    ({**NORM, "overlap_moe_expert_parallel_comm": True}, "E-M10: .* runs parts of"),
    ({**NORM, "cuda_graph_impl": "local"}, "E-M10: .* with CUDA graphs"),
    ({**NORM, "use_legacy_models": True}, "E-M10: .* only models of megatron.core"),
    ({"recompute_norm_num_layers": 1}, "--recompute-norm is not given"),
    ({"recompute_activation_function_num_layers": 1}, "-function is not given"),
    ({**NORM, "recompute_norm_num_layers": -1}, r"must lie in \[0, --num-layers\]"),
    ({**ACT, "recompute_activation_function_num_layers": 9, "num_layers": 8}, r"must lie in \[0"),
    ({**NORM, "enable_recompute_layers_per_pp_rank": True}, "on virtual pipeline stages"),
    ({**VIRTUAL, "enable_recompute_layers_per_pp_rank": True}, "on virtual pipeline stages"),
    ({"recompute_in_bubble": True}, "--recompute-in-bubble is planned but not built yet"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_refused_with_its_code(values, words):
    with pytest.raises(mindspeed.PlanError, match=words):
        mindspeed.plan(values, level=2)


@pytest.mark.parametrize(
    "values",
    [
        NORM,
        ACT,
        {**NORM, **ACT, **BLOCK},
        {**NORM, **ACT, "recompute_norm_num_layers": 0, "num_layers": 8},
        {**BLOCK, **VIRTUAL, "enable_recompute_layers_per_pp_rank": True},
        {**NORM, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        {**NORM, "context_parallel_size": 2, "memory_fragmentation": True},
    ],
)
def test_served_at_level_2(values):
    plan = mindspeed.plan(values, level=2)
    assert {"memory.recompute", "memory.session"} <= set(plan.features)
    patched = {step.patch.path for step in plan.acting}
    assert "GPTModel.__init__" in patched
    assert ("MLP.forward" in patched) == ("recompute_activation_function" in values)


def test_a_planned_budget_goes_with_a_divided_sequence():
    plan = mindspeed.plan({"memory_budget": "60%", "context_parallel_size": 2}, level=2)
    assert {"memory.planner", "context.algorithm"} <= set(plan.features)


def test_lower_levels_refuse_the_flags_and_level_2_is_quiet_without_them():
    with pytest.raises(mindspeed.PlanError, match="belongs to optimization level 2"):
        mindspeed.plan(NORM, level=1)
    words = ["--recompute-norm", "--recompute-norm-num-layers", "1"]
    made = parse([*words, "--optimization-level", "2"]).config
    check(made, 1)
    assert made.plan_values()["recompute_norm_num_layers"] == 1
    assert not any(name.startswith("memory.") for name in mindspeed.plan({}, level=2).features)


def test_a_configuration_carries_its_settings_through_copies():
    config = SimpleNamespace()
    settings.mark(config, {})
    assert not hasattr(config, "memory_settings")
    settings.mark(config, {**NORM, "recompute_norm_num_layers": 3})
    wanted = MemorySettings(norm=True, norm_layers=3)
    for found in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert found.memory_settings == wanted


def test_advice_is_in_bytes():
    sizes = {"seq_length": 1024, "hidden_size": 512, "ffn_hidden_size": 2048, "bf16": True}
    split = {**sizes, "tensor_model_parallel_size": 2, "micro_batch_size": 4}

    def told(**values):
        return feature.advise(SimpleNamespace(**values))

    assert "activation functions: 8.00 MiB a layer" in told(**ACT, **split)
    assert "all layers" in told(**ACT, **split)
    assert "norms: 8.00 MiB" in told(**NORM, **split)
    assert "norms: 4.00 MiB" in told(**NORM, **split, sequence_parallel=True)
    assert "3 layers of a stage" in told(**NORM, **split, recompute_norm_num_layers=3)
    assert told(**NORM) == "bytes need --seq-length and --hidden-size"
    assert told(**sizes) == "nothing is computed again"
