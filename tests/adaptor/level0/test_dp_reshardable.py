"""The format in which Megatron-LM stores a distributed optimizer unless told otherwise."""

import functools
from unittest import mock

from support.mutation import Mutation
from support.ranks import run_ranks

TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}


def losses(rank, world_size, folder, part):
    """Losses of steps 1 to 6 in one go, of 1 to 3 with a save, or of 4 to 6 after a load."""
    from mindspeed.train import TrainConfig, checkpoint
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(**TINY, use_distributed_optimizer=True, lr=1e-2)
    stored = mock.patch.object(checkpoint, "_sharding_type", return_value="dp_reshardable")
    with stored, Trainer(config) as trainer:
        if part == "second":
            trainer.load(folder)
            return [r.loss for r in trainer.run(3)]
        found = [r.loss for r in trainer.run(6 if part == "whole" else 3)]
        if part == "first":
            trainer.save(folder)
        return found


def test_resumes_bit_for_bit(tmp_path):
    run = functools.partial(run_ranks, losses, 2, str(tmp_path), preload="megatron", timeout=120)
    whole = run("whole")[0]
    assert run("first")[0] == whole[:3]
    assert run("second")[0] == whole[3:]
    step_zero = Mutation(
        "the step of the loading optimizer",
        "mindspeed.features.level0.optimizer:wrap_set_states",
        "{**tensors, **kept}",
        "{**kept, **tensors}",
    )
    assert run("second", mutate=[step_zero])[0][2] != whole[5]
