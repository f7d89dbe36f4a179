"""Every way in which Megatron divides a GPT trains on the CPU and equals the one-process run."""

from functools import cache

import pytest

from mindspeed.train.config import TrainConfig
from support.ranks import run_ranks

STEPS = 6
# fp32 sums in another order: rounding at first, then what the steps of Adam make of it.
EARLY, LATE = 2e-6, 1e-5
BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "lr": 3e-3,
}
LLAMA = {"normalization": "RMSNorm", "swiglu": True, "num_query_groups": 2}
MOE = {"num_experts": 4, "moe_router_topk": 2, "add_bias_linear": False}
TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_communication": True}
DIST = {"use_distributed_optimizer": True}
OVERLAP = {**DIST, "overlap_grad_reduce": True, "overlap_param_gather": True}
FOUR = {"num_layers": 4}  # one for each virtual stage
EP = {"expert_model_parallel_size": 2}
A2A = {"moe_token_dispatcher_type": "alltoall"}
GROUPED = {"moe_grouped_gemm": True, "bf16": True}

# name: (ranks, what the model is, how it is divided)
CASES = {
    "dp": (2, {}, {}),
    "dp_dist_opt": (2, {}, DIST),
    "dp_overlap": (2, {}, OVERLAP),
    "dp_overlap_buckets": (2, {}, {**OVERLAP, "ddp_bucket_size": 5000}),
    "dp_average": (2, {}, {**OVERLAP, "ddp_average_in_collective": True}),
    "tp": (2, {}, TP),
    "tp_llama": (2, LLAMA, TP),
    "sp": (2, {}, SP),
    "sp_llama": (2, LLAMA, SP),
    "pp": (2, {}, PP),
    "pp_untied": (2, {"untie_embeddings_and_output_weights": True}, PP),
    "vpp": (2, FOUR, VPP),
    "tp_pp_sp": (4, LLAMA, {**SP, **PP}),
    "tp_pp_vpp_sp": (4, FOUR, {**SP, **VPP}),
    "tp_dp_overlap": (4, {}, {**SP, **OVERLAP}),
    "pp_dp_overlap": (4, {}, {**PP, **OVERLAP}),
    "moe_dp": (2, MOE, {}),
    "ep_allgather": (2, MOE, EP),
    "ep_alltoall": (2, MOE, {**EP, **A2A}),
    "ep_tp_sp": (2, MOE, {**SP, **A2A}),
    "ep_etp": (4, MOE, {**SP, **EP, **A2A, "expert_tensor_parallel_size": 2}),
    "ep_etp_allgather": (4, MOE, {**SP, **EP, "expert_tensor_parallel_size": 2}),
    "ep_dist_opt": (4, MOE, {**EP, **A2A, **OVERLAP}),
}


def losses(rank, world_size, options, steps=STEPS):
    from mindspeed.train.trainer import Trainer

    with Trainer(TrainConfig.of(**{**BASE, **options})) as trainer:
        return [(result.loss, result.grad_norm) for result in trainer.run(steps)]


@cache
def one_process(items, steps=STEPS):
    return run_ranks(losses, 1, dict(items), steps, preload="megatron")[0]


@cache
def divided(ranks, items):
    return run_ranks(losses, ranks, dict(items), preload="megatron", timeout=120)


def freeze(options):
    return tuple(sorted(options.items()))


def check(ranks, model, split, early=EARLY, late=LATE):
    want = one_process(freeze(model))
    for got in divided(ranks, freeze({**model, **split})):
        for step, ((loss, norm), (loss_1, norm_1)) in enumerate(zip(got, want, strict=True)):
            limit = early if step < 3 else late
            assert abs(loss - loss_1) <= limit, f"loss of step {step}: {loss} against {loss_1}"
            assert abs(norm - norm_1) <= 10 * limit, f"norm of step {step}: {norm}, {norm_1}"
    assert want[-1][0] < want[0][0] - 0.1, "the reference does not learn"


# The cases that the oldest supported Megatron runs as well.
OLDEST = ("dp", "tp", "sp", "pp", "vpp", "dp_overlap", "ep_alltoall")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.megatron014] if n in OLDEST else []) for n in CASES],
)
def test_equals_one_process(name):
    check(*CASES[name])


@pytest.mark.parametrize(
    ("name", "early", "late"), [("tp", 0.02, 0.05), ("dp_overlap", 0.02, 0.05), ("pp", 0.02, 0.05)]
)
def test_bf16_equals_one_process(name, early, late):
    ranks, model, split = CASES[name]
    check(ranks, {**model, "bf16": True}, split, early, late)


def test_fp16_scales_its_loss_dynamically():
    scale = {"initial_loss_scale": 2.0**30, "loss_scale_window": 2, "hysteresis": 1}
    start = {**FOUR, "fp16": True, **scale}
    for results in run_ranks(scaled, 2, start, preload="megatron", timeout=120):
        scales = [scale for scale, _, _ in results]
        assert results[0][1], "the first scale overflows"
        assert scales[1] == scales[0] / 2
        assert not results[-1][1]
        assert results[-1][2] < results[0][2]


def scaled(rank, world_size, options):
    from mindspeed.train.trainer import Trainer

    with Trainer(TrainConfig.of(**{**BASE, **options})) as trainer:
        return [(r.loss_scale, r.skipped, r.loss) for r in trainer.run(24)]


RECOMPUTE = {
    "full_uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full_block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ("layernorm",)},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_equals_the_plain_run_bitwise(name):
    model = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    if name == "layernorm":
        model = {}  # recomputing a norm replays no dropout
    want = one_process(freeze(model))
    assert one_process(freeze({**model, **RECOMPUTE[name]})) == want


def test_dropout_differs_by_rank_inside_the_fork_and_is_equal_outside():
    inside, outside = zip(*run_ranks(draws, 2, preload="megatron"), strict=True)
    assert inside[0] != inside[1]
    assert outside[0] == outside[1]


def draws(rank, world_size):
    import torch

    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(**BASE, **TP)
    with Trainer(config):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():
            inside = torch.rand(4).tolist()
        return inside, torch.rand(4).tolist()


def test_the_dispatchers_agree():
    split = {**MOE, **EP}
    gathered = divided(2, freeze(split))[0]
    exchanged = divided(2, freeze({**split, **A2A}))[0]
    for (a, _), (b, _) in zip(gathered, exchanged, strict=True):
        assert abs(a - b) <= EARLY


@pytest.mark.parametrize("split", [{}, {**EP, **A2A}], ids=["one", "ep"])
def test_grouped_experts_equal_sequential_ones(split):
    """Their weights are drawn in another order, so the curves agree, not the bits."""
    ranks = 2 if split else 1
    sequential = {**MOE, **split, "bf16": True}
    grouped = {**MOE, **split, **GROUPED}
    a = run_ranks(losses, ranks, sequential, 12, preload="megatron")[0]
    b = run_ranks(losses, ranks, grouped, 12, preload="megatron")[0]
    assert abs(a[0][0] - b[0][0]) < 0.05
    assert abs(a[-1][0] - b[-1][0]) < 0.3
    assert b[-1][0] < b[0][0] - 0.1
