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


# Every save starts a process per rank that imports torch: 3 s. So a save serves several tests.
CASES = {  # fp32 with DISTRIBUTED is in the test of the asynchronous save
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "bf16_distributed": (2, DISTRIBUTED | {"bf16": True}),
    "fp16": (1, {"fp16": True, "initial_loss_scale": 2.0**30, "loss_scale_window": 2.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bitwise_equal(name, tmp_path):
    world_size, sizes = CASES[name]
    first, _ = ranks(world_size, TINY | sizes, 3, None, str(tmp_path))
    check_resumed(world_size, TINY | sizes, first, tmp_path)


def check_resumed(world_size, flat, first, folder):
    whole, valid = ranks(world_size, flat, 6)
    rest, resumed_valid = ranks(world_size, flat, 3, str(folder))
    assert first + rest == whole
    assert resumed_valid == valid


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    """All six losses of two processes, and the folder that they save after three."""
    folder = tmp_path_factory.mktemp("two")
    flat = TINY | DISTRIBUTED | {"hidden_dropout": 0.0}
    ranks(2, flat, 3, None, str(folder))
    return ranks(2, flat, 6)[0], folder


@pytest.mark.parametrize(
    "target",
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (1, {}),
    ],
    ids=["tp2", "pp2", "one"],
)
def test_reshard(target, saved_by_two):
    whole, folder = saved_by_two
    flat = TINY | DISTRIBUTED | {"hidden_dropout": 0.0}
    world_size, sizes = target
    rest, _ = ranks(world_size, flat | sizes, 3, str(folder), None, False, True)
    for mine, theirs in zip(rest, whole[3:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_async_save_resumes_like_sync(tmp_path):
    flat = TINY | DISTRIBUTED
    first, _ = ranks(2, flat, 3, None, str(tmp_path), True)
    check_resumed(2, flat, first, tmp_path)


@pytest.fixture(scope="module")
def saved_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return ranks(1, TINY, 3, None, str(folder))[0], folder


@pytest.fixture
def saved(saved_by_one):
    return saved_by_one[1]


def test_one_process_resumes_bit_for_bit(saved_by_one):
    check_resumed(1, TINY, *saved_by_one)


def damaged(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    return copy, checkpoint_folder(copy)


def test_record(saved):
    record = read_state(checkpoint_folder(saved))
    assert record["step"] == 3
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
