"""The command line: every bad value is an error before any process starts."""

import dataclasses

import pytest

from mindspeed.train import TrainConfig
from mindspeed.train.args import DEFAULT_JOB, UsageError, build_parser, parse
from mindspeed.train.cli import main
from mindspeed.train.config import section_of_leaf
from mindspeed.train.flags import GROUPS
from mindspeed.train.validate import ConfigError, check


def test_every_leaf_has_a_flag_and_every_flag_a_leaf():
    rows = [row for group in GROUPS.values() for row in group]
    leaves = set(section_of_leaf())
    without = {"vocab_size", "optimization_level", "feature_flags"}
    assert {row.leaf for row in rows} == leaves - without
    flags = [row.flag for row in rows]
    assert len(flags) == len(set(flags))
    assert all(row.help for row in rows)


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for title in ("run:", *(f"{title}:" for title in GROUPS)):
        assert f"\n{title}\n" in text
    assert "--use-nanopipe" not in text


def test_values_reach_the_configuration():
    words = (
        "--num-layers 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
        "--bf16 --no-swiglu --disable-bias-linear --lr 0.5 --data a.txt b.txt --timeout 7"
    )
    options = parse(words.split())
    flat = options.config.flat()
    assert flat["num_layers"] == 8
    assert flat["virtual_pipeline_model_parallel_size"] == 2
    assert flat["bf16"] is True
    assert flat["swiglu"] is False
    assert flat["add_bias_linear"] is False
    assert flat["lr"] == 0.5
    assert flat["data"] == ("a.txt", "b.txt")
    assert flat["distributed_timeout"] == 7.0
    assert "hidden_size" not in options.given


def test_defaults_are_the_demonstration_job():
    options = parse([])
    assert options.config.replace(optimization_level=0) == TrainConfig.of(**DEFAULT_JOB)
    assert options.given == frozenset()
    assert options.config.optimization_level == 2
    check(options.config, options.nproc)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-layrs 3", "unknown flag --num-layrs; did you mean '--num-layers'"),
        ("--use-nanopipe", "planned"),
        ("--jit-compile", "not supported"),
        ("--attention-mask-type general --nproc 1", "this command's have none"),
        ("--num-layers many", "--num-layers: invalid int value"),
        ("--normalization Batch", "invalid choice"),
        ("--nproc 0", "--nproc must be at least 1"),
        ("--name a/b", "--name must be a plain folder name"),
        ("--reshard", "--reshard acts only with --resume"),
        ("--save-interval 3", "--save-interval acts only with --save"),
        ("--resume --compare-levels", "--resume continues one level"),
        ("--num-query-groups 2", "--group-query-attention"),
        ("--nproc 3 --tensor-model-parallel-size 2", "(3) is not divisible by tensor 2 x pipeline"),
        ("--hidden-size 130", "--hidden-size (130) is not divisible by --num-attention-heads (4)"),
        ("--global-batch-size 3", "--global-batch-size (3) is not divisible"),
        ("--bf16 --fp16", "--bf16 and --fp16 exclude each other"),
        ("--lr -1", "--lr must be greater than 0"),
        ("--hidden-dropout 1.5", "--hidden-dropout must lie in [0, 1)"),
        ("--sequence-parallel", "--sequence-parallel needs --tensor-model-parallel-size"),
        ("--overlap-param-gather", "--overlap-param-gather needs --overlap-grad-reduce"),
        ("--context-parallel-size 2 --optimization-level 1", "give --optimization-level 2"),
        ("--context-parallel-size 2 --compare-levels", "give --optimization-level 2"),
        ("--context-parallel-algo megatron_cp_algo", "the sequence is not divided"),
        ("--train-iters 0", "--train-iters must be greater than 0"),
        ("--data none.txt", "none.txt: no such file"),
        ("--tokenizer none.json", "tokenizer"),
        ("--resume", "no run yet"),
        ("--resume nowhere", "no such folder"),
        ("--optimization-level 7", "invalid choice"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments.split())
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_run_and_checkpoint_are_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert main(["--name", "mine"]) == 2
    assert "choose another --name" in capsys.readouterr().err
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert main(["--save", "kept"]) == 2
    assert "holds a checkpoint of step 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flat", "world_size", "message"),
    [
        ({"num_layers": 3, "pipeline_model_parallel_size": 2}, 2, "--num-layers (3)"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1,
             "overlap_p2p_communication": False, "global_batch_size": 4},
            2,
            "wrong gradients",
        ),
        ({"num_experts": 3, "expert_model_parallel_size": 2}, 2, "--num-experts (3)"),
        ({"expert_model_parallel_size": 2}, 2, "needs --num-experts"),
        ({"recompute_granularity": "full"}, 1, "needs --recompute-method"),
        ({"num_experts": 2, "tensor_model_parallel_size": 2}, 2, "need --sequence-parallel"),
        ({"min_lr": 1.0, "lr": 0.5}, 1, "--min-lr"),
        ({"lr_warmup_iters": 10}, 1, "--lr-warmup-iters"),
    ],
)  # fmt: skip
def test_combinations(flat, world_size, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        check(TrainConfig.of(**flat), world_size)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        check(TrainConfig.of(lr=-1.0, num_layers=0, bf16=True, fp16=True), 1)
    assert len(str(error.value).splitlines()) >= 3


def test_unknown_leaf_is_named():
    with pytest.raises(TypeError, match="num_layer"):
        TrainConfig.of(num_layer=2)


def test_configuration_is_frozen_and_survives_json():
    import json

    config = TrainConfig.of(data=("a",), feature_flags=(("x", 1), ("y", None)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert TrainConfig.from_flat(json.loads(json.dumps(config.flat()))) == config
    assert config.plan_values()["x"] == 1


def test_flags_do_not_abbreviate():
    with pytest.raises(SystemExit):
        parse(["--num-lay", "2"])
    assert build_parser().prog == "mindspeed train"


def test_both_ways_to_say_virtual_stages_exclude_each_other():
    words = "--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 2"
    with pytest.raises(UsageError, match="give one of them"):
        parse(words.split())


@pytest.mark.parametrize(
    ("argv", "levels"),
    [([], [0, 1]), (["--num-layers", "2"], [1]), (["--context-parallel-size", "2"], [2])],
)
def test_no_argument_means_a_comparison(argv, levels, monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindspeed.train.job.run_job", lambda *call: seen.append(call) or 0)
    assert main(argv) == 0
    ((options, _, trained),) = seen
    assert trained == levels
    assert options.compare_levels == (len(levels) > 1)


def test_level_zero_refuses_flags_of_features(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["--optimization-level", "0", "--use-fused-swiglu"]) == 2
    assert "level" in capsys.readouterr().err


def test_missing_package_of_a_level_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindspeed.levels.is_installed", lambda name: name != "ms-ops")
    assert main(["--optimization-level", "1"]) == 2
    assert "pip install 'mindspeed[l1]'" in capsys.readouterr().err
    assert main(["--compare-levels"]) == 2
    assert "ms-ops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "given", "refused"),
    [("old", (), True), ("new", (), False), ("old", ("data",), False), (None, (), False)],
)
def test_changed_text_is_noticed_when_resuming(before, given, refused, tmp_path):
    import json

    from mindspeed.train.runs import RunPlan, check_text
    from mindspeed.train.state import CheckpointError

    (tmp_path / "config.json").write_text(json.dumps({"text_key": before} if before else {}))
    plan = RunPlan(TrainConfig(), tmp_path, tmp_path, tmp_path, 1, None, text="new")
    if refused:
        with pytest.raises(CheckpointError, match="text has changed"):
            check_text(plan, given)
    else:
        check_text(plan, given)
