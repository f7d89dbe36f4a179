"""The profiling flags: what they ask for, what they refuse, what they leave in both entries."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from types import ModuleType

import pytest

import mindspeed
from mindspeed.features import add_flags
from mindspeed.features.arguments import parse_megatron
from mindspeed.features.native import add_native
from mindspeed.features.profile import native, trace
from mindspeed.patching.plan import draft
from mindspeed.train import TrainConfig, Trainer
from mindspeed.train.args import parse
from mindspeed.train.cli import main
from mindspeed.train.level import config_for
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks

TINY = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "train_iters": 5,
}


def problems(line, level=0):
    return draft(parse_megatron(line.split()), level, "cpu", "0.16.1").problems


# ---- the command line


def test_without_a_flag_nothing_is_active():
    made = mindspeed.plan(parse_megatron([]), 0, "cpu", "0.16.1")
    assert not {"profile", "profile.native", "determinism"} & set(made.features)


@pytest.mark.parametrize("level", [0, 1])
def test_it_acts_at_every_level_and_has_the_seeds_defaults(level):
    args = parse_megatron(["--profile"])
    assert "profile" in mindspeed.plan(args, level, "cpu", "0.16.1").features
    assert {name: value for name, value in vars(args).items() if name in trace._READ} == {
        "profile_step_start": 10,
        "profile_step_end": 12,
        "profile_ranks": (-1,),
        "profile_level": "level0",
        "profile_with_cpu": False,
        "profile_with_stack": False,
        "profile_with_memory": False,
        "profile_record_shapes": False,
        "profile_save_path": "./profile_dir",
    }


BAD = [
    ("--profile-level level1", "but not --profile"),
    ("--profile-save-path x", "but not --profile"),
    ("--profile --profile-with-memory", "Give --profile-with-cpu as well"),
    ("--profile --profile-with-stack", "Give --profile-with-cpu as well"),
    ("--profile --profile-record-shapes", "Give --profile-with-cpu as well"),
    ("--profile --profile-step-end 10", "must be greater than --profile-step-start"),
    ("--profile --profile-step-start 13", "must be greater than --profile-step-start"),
    ("--profile --profile-step-start -1", "must not be negative"),
    ("--profile --use-pytorch-profiler --profile-with-cpu", "Leave out --use-pytorch-profiler"),
]


@pytest.mark.parametrize(("line", "text"), BAD, ids=[line for line, _ in BAD])
def test_what_cannot_be_is_a_problem_of_the_plan(line, text):
    (problem,) = problems(line)
    assert text in problem


def test_a_level_that_does_not_exist_is_an_error_of_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse_megatron(["--profile", "--profile-level", "level3"])
    assert "level3" in capsys.readouterr().err


def test_good_lines_have_no_problem():
    everything = "--profile-with-cpu --profile-with-memory --profile-with-stack"
    assert problems(f"--profile {everything} --profile-record-shapes --profile-ranks 0 3") == ()
    assert problems("--profile --use-pytorch-profiler") == ()
    assert problems("--profile-step-start 3") == ()  # Megatron-LM's own, which ignores it alone


def check_refusals(tmp_path):
    (tmp_path / "file").touch()
    for values, text in (
        ({"profile_ranks": [2]}, "--profile-ranks names rank 2"),
        ({"profile_ranks": [-2]}, "--profile-ranks names rank -2"),
        ({"train_iters": 9}, "training ends with iteration 9"),
        ({"profile_save_path": str(tmp_path / "file")}, "is not a folder"),
        ({"profile_ranks": []}, "ranks is empty"),
    ):
        with pytest.raises(ValueError, match=text):
            trace.make_hook({"profile": True, **values}, 0, 2)


def test_what_needs_the_world_is_refused_at_the_start(tmp_path):
    check_refusals(tmp_path)
    assert trace.make_hook({"profile": True, "profile_ranks": [1]}, 0, 2) is None
    assert trace.make_hook({"profile": True, "use_pytorch_profiler": True}, 0, 2) is None
    assert os.listdir(tmp_path) == ["file"]


def test_a_wrong_bound_of_the_ranks_is_caught(tmp_path):
    wrong = Mutation("bound", "mindspeed.features.profile.trace:check", "< world", "<= world")
    assert_caught(wrong, lambda: check_refusals(tmp_path))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--profile --profile-ranks 7", "--profile-ranks names rank 7"),
        ("--profile --train-iters 3", "training ends with iteration 3"),
        ("--profile-with-cpu", "but not --profile"),
    ],
)
def test_mindspeed_train_refuses_before_any_process(line, text, tmp_path, capsys):
    assert main(["--runs", str(tmp_path / "runs"), *line.split()]) == 2
    assert text in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_what_a_user_may_not_expect_is_noted():
    flags = {"profile": True, "profile_step_start": 3, "profile_step_end": 5}
    (text,) = trace.notes(flags, 0, "cpu")
    assert "the CPU is the device" in text
    assert list(trace.notes({**flags, "profile_with_cpu": True}, 3, "cpu")) == []
    (text,) = trace.notes(flags, 4, "npu")
    assert "window is the iterations 3 to 4, and training goes on with 5" in text
    assert list(trace.notes({}, 9, "cpu")) == []


# ---- levels side by side


def test_each_level_has_a_folder_and_level_0_keeps_its_own_flags():
    config = parse(["--profile", "--profile-save-path", "out", "--profile-with-cpu"]).config
    config = config.replace(feature_flags=(*config.feature_flags, ("use_fused_rmsnorm", True)))
    alone = dict(config_for(config, 1, [1]).feature_flags)
    assert alone["profile_save_path"] == "out"
    zero, one = (dict(config_for(config, level, [0, 1]).feature_flags) for level in (0, 1))
    assert zero == {"profile": True, "profile_save_path": "out/level0", "profile_with_cpu": True}
    assert one == {
        "profile": True,
        "profile_save_path": "out/level1",
        "profile_with_cpu": True,
        "use_fused_rmsnorm": True,
    }
    plain = parse([]).config
    assert config_for(plain, 0, [0, 1]).feature_flags == ()


# ---- training


def trained(rank, world_size, folder):
    """The losses of five steps: plain, traced, traced on after a resume."""
    plain = TrainConfig.of(**TINY)
    flags = {
        "profile": True,
        "profile_step_start": 3,
        "profile_step_end": 5,
        "profile_ranks": [1],
        "profile_level": "level1",
        "profile_save_path": f"{folder}/traced",
    }
    traced = plain.replace(feature_flags=tuple(flags.items()))
    losses = []
    for config in (plain, traced):
        with Trainer(config) as trainer:
            losses.append([result.loss for result in trainer.run(2)])
            trainer.save(f"{folder}/saved")
            losses[-1] += [result.loss for result in trainer.run(3)]
    again = {**flags, "profile_save_path": f"{folder}/resumed"}
    with Trainer(plain.replace(feature_flags=tuple(again.items()))) as trainer:
        trainer.load(f"{folder}/saved")
        losses.append(losses[0][:2] + [result.loss for result in trainer.run(3)])
    return losses


def test_training_is_traced_and_not_changed(tmp_path):
    ranks = run_ranks(trained, 2, str(tmp_path), preload="megatron")
    for losses in ranks:
        assert losses[0] == losses[1] == losses[2]
    for folder in ("traced", "resumed"):
        names = ["rank1_steps3-5.pt.trace.json", "rank1_steps3-5.summary.json"]
        assert sorted(os.listdir(tmp_path / folder)) == names
        events = json.loads((tmp_path / folder / names[0]).read_text())["traceEvents"]
        rows = [event["name"] for event in events]
        assert [n for n in rows if n.startswith("ProfilerStep")] == [
            "ProfilerStep#3",
            "ProfilerStep#4",
        ]
        assert any(n.endswith("[DATA_PARALLEL_GROUP_WITH_CP]") for n in rows)
        assert json.loads((tmp_path / folder / names[1]).read_text())["steps"] == [3, 4]


# ---- Megatron-LM


def test_megatrons_parser_gets_our_default_and_keeps_the_rest():
    parser = ArgumentParser(allow_abbrev=False)
    add_native(parser)
    add_flags(parser)
    assert parser.parse_args([]).profile_ranks == (-1,)
    assert parser.parse_args(["--profile-ranks", "0", "2"]).profile_ranks == [0, 2]
    assert parser.parse_args([]).profile_step_start == 10


@pytest.mark.parametrize(
    ("given", "expected"), [((-1,), [0]), ([-1], [0, 1, 2]), ([1, -1], [0, 1, 2]), ([2], [2])]
)
def test_megatrons_own_profiler_gets_ranks_that_it_knows(given, expected, monkeypatch):
    args = Namespace(profile_ranks=given, world_size=3)
    training = ModuleType("megatron.training")
    training.get_args = lambda: args
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    seen = []
    native.wrap_train(lambda: seen.append(args.profile_ranks))()
    assert seen == [expected]
    assert args.profile_ranks == given


def test_hccl_gets_the_names_of_groups(monkeypatch):
    class Options:
        hccl_config = None

    c10d = ModuleType("torch_npu._C._distributed_c10d")
    c10d.ProcessGroupHCCL = Namespace(Options=Options)
    for name in ("torch_npu", "torch_npu._C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, c10d.__name__, c10d)
    own = object()
    wrapped = trace.wrap_group_options(lambda name, configs: configs.get(name))
    assert wrapped("tp", {}).hccl_config == {"group_name": "tp"}
    assert wrapped("dp", {"dp": own}) is own
    steps = mindspeed.plan(parse_megatron(["--profile"]), 0, "npu", "0.16.1").acting
    assert "megatron.core.parallel_state:get_nccl_options" in {s.patch.target for s in steps}
