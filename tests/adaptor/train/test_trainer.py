"""Every split of the model reaches the losses of the one-process run; Megatron's own features."""

import pytest

from mindspeed.train import TrainConfig, Trainer
from support.ranks import run_ranks

STEPS = 6
TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": STEPS,
}
EXPERTS = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
}


def losses(rank, world_size, flat, steps=STEPS):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        results = trainer.run(steps)
    return [(result.loss, result.grad_norm) for result in results]


_reference: dict = {}


def reference(flat):
    """The run of one process, once for each model."""
    key = repr(sorted(flat.items()))
    if key not in _reference:
        _reference[key] = run_ranks(losses, 1, flat, preload="megatron")[0]
    return _reference[key]


def assert_equal_curves(got, wanted, first=2e-6, last=1e-4):
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        tolerance = first if step < 3 else last
        assert mine == pytest.approx(theirs, rel=tolerance), f"step {step + 1}"


SPLITS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "dp2_distopt": (2, {"use_distributed_optimizer": True}),
    "dp2_distopt_overlap": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 5000,
        },
    ),
    "tp2_pp2_sp": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_split_equals_one_process(name):
    world_size, sizes = SPLITS[name]
    got = run_ranks(losses, world_size, TINY | sizes, preload="megatron")
    assert all(rank == got[0] for rank in got), "ranks report different results"
    assert_equal_curves(got[0], reference(TINY))
    assert got[0][-1][0] < got[0][0][0]


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_experts_split_equals_one_process(dispatcher):
    model = TINY | EXPERTS | {"moe_token_dispatcher_type": dispatcher}
    got = run_ranks(losses, 2, model | {"expert_model_parallel_size": 2}, preload="megatron")
    assert_equal_curves(got[0], reference(model))


RECOMPUTE = {
    "full_uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full_block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_is_bitwise_equal(name):
    model = TINY | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    assert run_ranks(losses, 1, model | RECOMPUTE[name], preload="megatron")[0] == reference(model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_low_precision_follows_fp32(precision, distributed):
    flat = TINY | {precision: True, "use_distributed_optimizer": distributed}
    got = run_ranks(losses, 2, flat, preload="megatron")[0]
    wanted = reference(TINY)
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in wanted], abs=0.05)


def test_modern_block():
    flat = TINY | {
        "normalization": "RMSNorm",
        "swiglu": True,
        "num_query_groups": 2,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    }
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    got = run_ranks(losses, 4, flat | sizes, preload="megatron")[0]
    assert_equal_curves(got, reference(flat))


def fp16_scales(rank, world_size, flat):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        return [(r.loss_scale, r.skipped) for r in trainer.run(4)]


def test_fp16_overflow_skips_and_lowers_the_scale():
    flat = TINY | {"fp16": True, "initial_loss_scale": 2.0**30, "hysteresis": 1}
    got = run_ranks(fp16_scales, 1, flat, preload="megatron")[0]
    assert got[0] == (2.0**30, True)
    assert got[1][0] == 2.0**29


def metered(rank, world_size, flat, measure):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        first = trainer.run(2)
        saved = trainer.measure_saved_bytes() if measure else 0
        last = trainer.run(2)
    return [(r.loss, r.grad_norm) for r in first + last], saved, last[0].saved_bytes


def test_measuring_saved_bytes_changes_no_step():
    flat = TINY | {"hidden_dropout": 0.1, "overlap_grad_reduce": True}
    plain, _, none = run_ranks(metered, 2, flat, False, preload="megatron")[0]
    curve, saved, reported = run_ranks(metered, 2, flat, True, preload="megatron")[0]
    assert curve == plain
    assert none == 0
    assert reported == saved > 0
    # Four micro batches follow each other: one of them is the peak, whatever their number.
    assert (
        saved
        == run_ranks(metered, 2, flat | {"global_batch_size": 2}, True, preload="megatron")[0][1]
    )
