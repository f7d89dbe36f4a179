"""The trainer itself. That every split equals one process is level 0's matrix of tests."""

import numpy as np
import pytest
import torch

from mindspeed.train import ConfigError, TrainConfig, Trainer
from support.ranks import RankError, run_ranks

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
MODERN = TINY | {
    "normalization": "RMSNorm",
    "swiglu": True,
    "num_query_groups": 2,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
EXPERTS = MODERN | {"num_experts": 4, "moe_layer_freq": 2, "moe_ffn_hidden_size": 24}
TP_PP = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "sequence_parallel": True,
}


def losses(rank, world_size, flat):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        results = trainer.run(STEPS)
    return [(r.loss, r.grad_norm, r.tokens) for r in results]


def test_ranks_report_equal_results_and_one_process_agrees():
    model = MODERN | {"global_batch_size": 4}
    one = run_ranks(losses, 1, model, preload="megatron")[0]
    four = run_ranks(losses, 4, model | TP_PP, preload="megatron")
    assert all(rank == four[0] for rank in four)
    for step, (got, wanted) in enumerate(zip(four[0], one, strict=True)):
        assert got == pytest.approx(wanted, rel=2e-6 if step < 3 else 1e-4), f"step {step + 1}"
    assert one[-1][0] < one[0][0]
    assert one[0][2] == model["global_batch_size"] * TINY["seq_length"]


def shards(rank, world_size, flat):
    """Every initial weight shard: its key, layer and expert, its window, the whole shape."""
    from mindspeed.train.initial import _leaves
    from mindspeed.train.model import unwrap

    found = []
    with Trainer(TrainConfig.of(**flat)) as trainer:
        for chunk in trainer.chunks:
            for entry in _leaves(unwrap(chunk).sharded_state_dict()):
                for part in _leaves(entry.build() if hasattr(entry, "build") else entry):
                    if not hasattr(part, "global_offset") or not torch.is_tensor(part.data):
                        continue
                    lead = part.prepend_axis_num
                    name = (part.key, part.global_offset[:lead])
                    starts = zip(part.global_offset[lead:], part.local_shape, strict=True)
                    window = tuple(slice(start, start + size) for start, size in starts)
                    values = part.data.detach().clone().numpy()
                    found.append((name, window, part.global_shape[lead:], values))
    return found


@pytest.mark.parametrize(
    ("model", "ranks", "split"),
    [
        (MODERN, 4, TP_PP),
        (TINY, 2, {"pipeline_model_parallel_size": 2}),
        (EXPERTS, 2, {"expert_model_parallel_size": 2}),
    ],
    ids=["tp_pp_vpp", "tied_pp", "experts"],
)
def test_initial_weights_do_not_depend_on_the_layout(model, ranks, split):
    (one,) = run_ranks(shards, 1, model, preload="megatron")
    whole = {}
    for name, window, shape, values in one:
        whole.setdefault(name, np.full(shape, np.nan))[window] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    seen = set()
    for rank in run_ranks(shards, ranks, model | split, preload="megatron"):
        for name, window, _, values in rank:
            assert (whole[name][window] == values).all(), name
            seen.add(name)
    assert seen == set(whole)
    matrices = [values for values in whole.values() if values.ndim == 2]
    assert all(values.std() > 0 for values in matrices)
    assert len({values.tobytes() for values in matrices}) == len(matrices), "two equal weights"


def metered(rank, world_size, flat, measure):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        results = [trainer.train_step(measure=measure and step == 1) for step in range(4)]
    return [(r.loss, r.grad_norm) for r in results], [r.measured for r in results]


def test_measuring_a_step_changes_no_number():
    flat = TINY | {"num_layers": 2, "hidden_dropout": 0.1, "overlap_grad_reduce": True}
    plain, none = run_ranks(metered, 2, flat, False, preload="megatron")[0]
    curve, [before, measured, *after] = run_ranks(metered, 2, flat, True, preload="megatron")[0]
    assert curve == plain
    assert {*none, before, *after} == {None}
    # Four micro batches follow each other: one of them is the peak, whatever their number. Only
    # the reports of the others are alive with it, two fp32 numbers each.
    single = flat | {"global_batch_size": 2}
    one = run_ranks(metered, 2, single, True, preload="megatron")[0][1][1]
    assert measured.saved_bytes == one.saved_bytes + 3 * 8 > 24
    assert measured.tensor_bytes > measured.saved_bytes
    assert measured.model_flops == measured.hardware_flops == 4 * one.model_flops
    assert measured.sent_bytes == one.sent_bytes > 0
    assert measured.sends == one.sends > 0
    assert " of " in measured.peak_at


def broken_meters(rank, world_size, flat):
    from ms_profile import CommMeter, FlopMeter

    def fail(self, *args):
        raise OSError("broken")

    CommMeter.before = FlopMeter.after = fail
    return metered(rank, world_size, flat, True)


def test_a_broken_meter_does_not_disturb_the_step():
    plain, _ = run_ranks(metered, 1, TINY, False, preload="megatron")[0]
    curve, [_, measured, *_] = run_ranks(broken_meters, 1, TINY, preload="megatron")[0]
    assert curve == plain
    assert (measured.model_flops, measured.sent_bytes) == (0, 0)
    assert measured.saved_bytes > 0


def stop_early(rank, world_size, flat):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        taken = []
        for step in range(4):
            result = trainer.train_step(stop=rank == 1 and step == 1)
            taken.append(result.stop)
    return taken


def test_all_ranks_see_one_ranks_wish_to_stop_in_the_same_step():
    wanted = [False, True, False, False]
    assert run_ranks(stop_early, 2, TINY, preload="megatron") == [wanted, wanted]


def one_after_another(rank, world_size, flat):
    curves = []
    for _ in range(2):
        with Trainer(TrainConfig.of(**flat)) as trainer:
            curves.append([result.loss for result in trainer.run(2)])
            with pytest.raises(RuntimeError, match="close the other Trainer"):
                Trainer(TrainConfig.of(**flat))
            curves[-1].append(trainer.train_step().loss)
    return curves


def test_trainers_follow_each_other_in_one_process_but_never_two_at_once():
    first, second = run_ranks(one_after_another, 1, TINY, preload="megatron")[0]
    assert first == second


def test_configuration_is_checked_against_the_world():
    with pytest.raises(RankError, match=r"number of processes \(2\) is not divisible"):
        run_ranks(losses, 2, TINY | {"pipeline_model_parallel_size": 4}, preload="megatron")
    with (
        pytest.raises(ConfigError, match="--sequence-parallel"),
        Trainer(TrainConfig.of(sequence_parallel=True)),
    ):
        pass
