"""Save and load: resumed runs equal uninterrupted ones bit for bit; other layouts; bad folders."""

import functools
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


# The first save of a process starts another one that imports torch: 3 s for each rank. So the cases
# of a world size are trained and saved by the same processes, one after another.
CASES = {
    1: {
        "plain": {},
        "fp16": {"fp16": True, "initial_loss_scale": 2.0**30, "loss_scale_window": 2.0},
    },
    2: {
        "plain": {},
        "tp": {"tensor_model_parallel_size": 2},
        "bf16_distributed": DISTRIBUTED | {"bf16": True},
        "distributed_async": DISTRIBUTED,
        "no_dropout": DISTRIBUTED | {"hidden_dropout": 0.0},
    },
}


def train_cases(rank, world_size, steps, save=None, load=None):
    found = {}
    for name, sizes in CASES[world_size].items():
        folders = [None if folder is None else f"{folder}/{name}" for folder in (load, save)]
        asynchronous = name.endswith("async")
        found[name] = train(rank, world_size, TINY | sizes, steps, *folders, asynchronous)
    return found


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """By world size: a folder a case, what its first three steps gave, and what all six give."""

    @functools.cache
    def find(world_size):
        folder = tmp_path_factory.mktemp("saved")
        run = functools.partial(run_ranks, train_cases, world_size, preload="megatron", timeout=120)
        return folder, run(3, str(folder))[0], run(6)[0]

    return find


@pytest.mark.parametrize("world_size", CASES)
def test_resume_is_bitwise_equal(world_size, halves):
    folder, first, whole = halves(world_size)
    rest = run_ranks(
        train_cases, world_size, 3, None, str(folder), preload="megatron", timeout=120
    )[0]
    for name in CASES[world_size]:
        assert first[name][0] + rest[name][0] == whole[name][0], name
        assert rest[name][1] == whole[name][1], f"{name}: validation"


@pytest.mark.parametrize(
    "target",
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (1, {}),
    ],
    ids=["tp2", "pp2", "one"],
)
def test_reshard(target, halves):
    folder, _, whole = halves(2)
    world_size, sizes = target
    flat = TINY | CASES[2]["no_dropout"] | sizes
    rest, _ = ranks(world_size, flat, 3, f"{folder}/no_dropout", None, False, True)
    for mine, theirs in zip(rest, whole["no_dropout"][0][3:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.fixture
def saved(halves):
    return halves(1)[0] / "plain"


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
