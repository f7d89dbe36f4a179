"""`--npu-deterministic` in both entries: equal bits, in time or an error, nothing left behind."""

import os
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import mindspeed
from mindspeed.features.arguments import parse_megatron
from mindspeed.features.profile import determinism
from mindspeed.patching.plan import draft
from mindspeed.train import TrainConfig, Trainer
from ms_profile.determinism import ENVIRONMENT
from support.mutation import Mutation
from support.ranks import run_ranks

CONFIG = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 64,
    "micro_batch_size": 1,
    "train_iters": 4,
    "hidden_dropout": 0.1,  # random, so that the seed matters
    "use_distributed_optimizer": True,
    "feature_flags": (("npu_deterministic", True),),
}


def train():
    """Losses of three steps, then every weight of this rank."""
    with Trainer(TrainConfig.of(**CONFIG)) as trainer:
        assert torch.are_deterministic_algorithms_enabled()
        assert trainer.chunks[0].config.deterministic_mode
        losses = torch.tensor([result.loss for result in trainer.run(3)])
        return [losses, *(weight.clone() for weight in trainer.parameters().values())]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


NO_SEED = Mutation(
    "no seed",
    "mindspeed.train.parallel:initialize",
    "(config.seed)",
    "(torch.seed() % 2**31)",
    count=2,
)


def runs(rank, world_size, folder):
    """Two equal runs, one without its seed, and one that comes too late."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    with determinism.scope(dict(CONFIG["feature_flags"])):
        store = dist.FileStore(f"{folder}/{world_size}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        one, two = train(), train()
        with NO_SEED.applied():
            other = train()
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == before
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        with pytest.raises(RuntimeError, match=r"deterministic\(\) comes too late"):
            Trainer(TrainConfig.of(**CONFIG))
        # A refused one leaves nothing behind.
        with Trainer(TrainConfig.of(**{**CONFIG, "feature_flags": ()})) as trainer:
            assert not trainer.chunks[0].config.deterministic_mode
    finally:
        dist.destroy_process_group()
    return one, two, other


def test_two_runs_are_equal_to_the_bit(tmp_path):
    for world_size in (1, 2):
        for one, two, other in run_ranks(
            runs, world_size, str(tmp_path), backend=None, preload="megatron"
        ):
            assert equal(one, two)
            assert not equal(one, other)


@pytest.mark.parametrize("level", [0, 1])
def test_it_acts_at_every_level(level):
    made = mindspeed.plan(parse_megatron(["--npu-deterministic"]), level, "cpu", "0.16.1")
    assert "determinism" in made.features


@pytest.mark.parametrize("other", ["--use-flash-attn", "--cross-entropy-loss-fusion"])
def test_what_is_not_deterministic_is_refused(other):
    args = parse_megatron(["--npu-deterministic", other])
    problems = draft(args, 1, "cpu", "0.16.1").problems
    assert [other in problem for problem in problems] == [True], problems


def test_megatron_lm_becomes_deterministic_before_its_first_group(monkeypatch):
    args = Namespace(npu_deterministic=True, deterministic_mode=False)
    training = ModuleType("megatron.training")
    training.get_args = lambda: args
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    seen = []

    def initialize(name):
        enabled = torch.are_deterministic_algorithms_enabled()
        seen.append((name, enabled, os.environ["HCCL_DETERMINISTIC"]))

    wrapped = determinism.wrap_initialize(initialize)
    try:
        wrapped("a")
        wrapped("b")
        assert seen == [("a", True, "true"), ("b", True, "true")]
        assert args.deterministic_mode is True
    finally:
        determinism._held.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "NCCL_ALGO" not in os.environ
