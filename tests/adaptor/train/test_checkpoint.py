"""Save and load: resumed runs equal uninterrupted ones bit for bit; other layouts; bad folders."""

import json
import shutil

import pytest

from mindspeed.train import CheckpointError, TrainConfig, Trainer
from mindspeed.train.state import checkpoint_folder, compare, read_state
from support.ranks import RankError, run_ranks

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "train_iters": 6,
    "hidden_dropout": 0.1,
}
DISTRIBUTED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


def train(rank, world_size, flat, steps, load=None, save=None, asynchronous=False, reshard=False):
    with Trainer(TrainConfig.of(**flat)) as trainer:
        if load is not None:
            trainer.load(load, reshard=reshard)
        results = trainer.run(steps)
        valid = trainer.evaluate(2)
        if save is not None:
            trainer.save(save, asynchronous=asynchronous)
    # A skipped step has no gradient norm, and nan differs from itself.
    rows = [(r.step, r.loss, None if r.skipped else r.grad_norm, r.lr) for r in results]
    return rows, valid


def ranks(world_size, flat, steps, *args):
    return run_ranks(train, world_size, flat, steps, *args, preload="megatron")[0]


CASES = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2_distributed": (2, DISTRIBUTED),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "bf16_distributed": (2, DISTRIBUTED | {"bf16": True}),
    "fp16": (1, {"fp16": True, "initial_loss_scale": 2.0**30, "loss_scale_window": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bitwise_equal(name, tmp_path):
    world_size, sizes = CASES[name]
    flat = TINY | sizes
    whole, valid = ranks(world_size, flat, 6)
    first, _ = ranks(world_size, flat, 3, None, str(tmp_path))
    rest, resumed_valid = ranks(world_size, flat, 3, str(tmp_path))
    assert first + rest == whole
    assert resumed_valid == valid


@pytest.mark.parametrize(
    "target",
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (1, {}),
    ],
    ids=["tp2", "pp2", "one"],
)
def test_reshard(target, tmp_path):
    flat = TINY | DISTRIBUTED | {"hidden_dropout": 0.0}
    whole, _ = ranks(2, flat, 6)
    ranks(2, flat, 3, None, str(tmp_path))
    world_size, sizes = target
    rest, _ = ranks(world_size, flat | sizes, 3, str(tmp_path), None, False, True)
    for mine, theirs in zip(rest, whole[3:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_async_save_equals_sync(tmp_path):
    flat = TINY | DISTRIBUTED
    whole, _ = ranks(2, flat, 6)
    ranks(2, flat, 3, None, str(tmp_path), True)
    rest, _ = ranks(2, flat, 3, str(tmp_path))
    assert rest == whole[3:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks(1, TINY, 1, None, str(folder))
    return folder


def damaged(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    return copy, checkpoint_folder(copy)


def test_record(saved):
    record = read_state(checkpoint_folder(saved))
    assert record["step"] == 1
    assert record["world_size"] == 1
    assert TrainConfig.from_flat(record["config"]) == TrainConfig.of(**TINY)
    assert not list(saved.glob(".*")), "temporary folders were left"


@pytest.mark.parametrize("name", ["train_state.json", "metadata.json", "common.pt", ".metadata"])
def test_missing_or_empty_file_is_named(name, saved, tmp_path):
    _, path = damaged(saved, tmp_path)
    (path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_state(path)


def test_no_tensor_file(saved, tmp_path):
    _, path = damaged(saved, tmp_path)
    for file in path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match="distcp"):
        read_state(path)


def test_garbled_record(saved, tmp_path):
    _, path = damaged(saved, tmp_path)
    (path / "train_state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        read_state(path)
    (path / "train_state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="world_size"):
        read_state(path)


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint_folder(tmp_path)


def test_truncated_tensors_raise_and_change_nothing(saved, tmp_path):
    copy, path = damaged(saved, tmp_path)
    before = {}
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RankError, match="cannot be read"):
        ranks(1, TINY, 1, str(copy))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_other_model_is_refused(saved):
    record = read_state(checkpoint_folder(saved))
    with pytest.raises(CheckpointError, match="--hidden-size is 32 there, 64 here"):
        compare(record, TrainConfig.of(**TINY | {"hidden_size": 64}), 1, reshard=True)


def test_other_world_size_needs_reshard(saved):
    record = read_state(checkpoint_folder(saved))
    config = TrainConfig.of(**TINY | {"tensor_model_parallel_size": 2})
    with pytest.raises(CheckpointError, match=r"processes 1 -> 2.*--reshard"):
        compare(record, config, 2, reshard=False)
    compare(record, config, 2, reshard=True)
