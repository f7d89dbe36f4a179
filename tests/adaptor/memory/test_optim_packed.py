"""--reuse-fp32-param in Megatron's optimizers: trajectories, bytes, state dicts, skipped steps.

What is compared is what ranks hold, in bits, with Megatron's own fp32 masters.
"""

import copy
from unittest import mock

import pytest
import torch

from ms_memory import MemoryFeatureError
from support.held_masters import (
    AWAY,
    EXACT,
    NATIVE,
    OVERLAP,
    SHARED,
    agree,
    alive,
    consistent,
    facts,
    opened,
    own,
    part,
    parts,
    run,
    same,
    same_structure,
    skip,
    step,
    weights,
    whole,
)
from support.mutation import Mutation
from support.ranks import RankError


def trained(options, flags, steps):
    """What steps lead to, the bytes that they leave behind, and how many weights this rank owns."""
    before = alive()
    with opened(options, flags) as trainer:
        found = facts(trainer, steps)
        owned = sum(p.numel() for _, p, _ in own(trainer).values())
        trainer.optimizer.zero_grad()
        held = alive() - before
        if flags:
            assert part(trainer).optimizer.nbytes() == owned * (2 + 4 + 4) + 8 * ties(trainer)
            held -= 8 * ties(trainer)
    return found, held, owned


def ties(trainer):
    return sum(len(packed._ties) for packed in part(trainer).optimizer.packed)


def check_trajectory(rank, world_size, options, steps):
    """Losses, masters, moments and weights are those with fp32 masters, in 2 bytes a weight less.

    Rounding ties away changes no printed digit in so few steps.
    """
    away, *_ = trained(options, AWAY, 2)  # first, as some bytes are made once
    wanted, dense, owned = trained(options, NATIVE, steps)
    found, packed, _ = trained(options, EXACT, steps)
    agree(found, wanted)
    assert dense - packed == 2 * owned > 0
    for mine, other in zip(away[0], wanted[0], strict=False):
        assert [f"{x:.4f}" for x in mine] == [f"{x:.4f}" for x in other]


def check_100_steps(rank, world_size):
    found = []
    for flags in (NATIVE, EXACT):
        with opened({}, flags) as trainer:
            tied = [ties(trainer) if flags else 1 for _ in step(trainer, 100)]
            assert any(tied)
            found.append((whole(trainer), weights(trainer)))
    same(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def test_trajectory_100():
    run(check_100_steps, 1)


def test_bytes_per_param():
    run(check_trajectory, 1, {}, 2)


@pytest.mark.megatron014
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_D123_gloo(ranks):
    run(check_trajectory, ranks, OVERLAP if ranks == 2 else SHARED, 5)


def pairs(mine, theirs):
    return [(mine[name], theirs[name]) for name in mine]


def frozen(names):
    """Chunks whose other parameters are frozen."""
    from mindspeed.train import model

    build = model.build_chunks

    def build_chunks(config):
        chunks = build(config)
        for name, p in chunks[0].named_parameters():
            p.requires_grad_(any(n in name for n in names))
        return chunks

    return mock.patch.object(model, "build_chunks", build_chunks)


def check_empty(rank, world_size):
    """One rank of two has no part of the only parameter that is trained."""
    found = []
    for flags in (NATIVE, EXACT):
        with frozen(["final_layernorm.weight"]), opened(SHARED, flags) as trainer:
            assert len(own(trainer)) == (rank == 0)
            found.append(facts(trainer, 3))
            saved = part(trainer).state_dict()
            assert saved["optimizer"]["param_groups"][0]["step"] == (0 if rank else 3)
            part(trainer).load_state_dict(saved)
    agree(*found)


def test_empty_shard():
    run(check_empty, 2)


def check_experts(rank, world_size):
    """Experts have an optimizer of their own; some weights are frozen."""
    options = {
        "num_experts": 2,
        "expert_model_parallel_size": 2,
        "add_bias_linear": False,
        **SHARED,
    }
    found = []
    for flags in (NATIVE, EXACT):
        with frozen(["experts", "norm", "qkv"]), opened(options, flags) as trainer:
            assert len(parts(trainer)) == 2
            found.append(facts(trainer, 3))
    assert found[0][0] == found[1][0]
    same(found[0][1], found[1][1])
    same(found[0][2], found[1][2])


def test_experts_and_frozen_weights():
    run(check_experts, 2)


def check_undivided(rank, world_size):
    """State dicts go both ways between fp32 and packed masters."""
    with opened({}, NATIVE) as trainer:
        trainer.run(2)
        theirs = copy.deepcopy(part(trainer).state_dict())
        kept = whole(trainer)
    with opened({}, EXACT) as trainer:
        optimizer = part(trainer)
        optimizer.load_state_dict(copy.deepcopy(theirs))
        same(whole(trainer), kept)
        consistent(trainer)
        ours = copy.deepcopy(optimizer.state_dict())
        same_structure(ours, theirs)
        adopt(trainer)
        assert any(not torch.equal(a[0], b[0]) for a, b in pairs(whole(trainer), kept))
        optimizer.load_state_dict(copy.deepcopy(ours))
        list(step(trainer, 3))
        wanted = whole(trainer)
    with opened({}, NATIVE) as trainer:
        part(trainer).load_state_dict(copy.deepcopy(ours))
        same(whole(trainer), kept)
        list(step(trainer, 3))
        same(whole(trainer), wanted)


def adopt(trainer):
    """Weights written from outside are refused until they are taken as the masters."""
    p = next(trainer.chunks[0].parameters())
    with torch.no_grad():
        p.add_(1)
    with pytest.raises(MemoryFeatureError, match="E-M40"):
        list(step(trainer, 1))
    trainer.optimizer.reload_model_params()
    list(step(trainer, 1))


def test_undivided():
    run(check_undivided, 1)


LOADED_WEIGHTS_STAY = Mutation(
    "loaded masters are left out",
    "mindspeed.features.memory.optim.megatron:HeldFloat16Optimizer.load_state_dict",
    "self.optimizer.set_master(p, master.data)",
    "pass",
)
TIES_LOST = Mutation(
    "ties are forgotten",
    "ms_memory.optim.packed:PackedMaster.split_",
    "self._ties = torch.cat(kept)",
    "self._ties = self._ties[:0]",
)


@pytest.mark.parametrize(
    ("mistake", "check"),
    [(LOADED_WEIGHTS_STAY, check_undivided), (TIES_LOST, check_100_steps)],
    ids=["load", "ties"],
)
def test_mistakes_are_caught(mistake, check):
    with pytest.raises(RankError, match="AssertionError"):
        run(check, 1, mutate=[mistake])


def check_skipped(rank, world_size):
    for options in ({}, SHARED):
        with opened(options, EXACT) as trainer:
            list(step(trainer, 2))
            kept, model = whole(trainer), weights(trainer)
            skip(trainer)
            same(whole(trainer), kept)
            same(weights(trainer), model)


def test_skipped_step():
    run(check_skipped, 1)
