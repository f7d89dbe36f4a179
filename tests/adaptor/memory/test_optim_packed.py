"""--reuse-fp32-param in Megatron's optimizers: trajectories, bytes, checkpoints, skipped steps.

What is compared is what ranks hold, in bits, with Megatron's own fp32 masters.
"""

import copy
from pathlib import Path
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
    facts,
    gathered,
    load_plain,
    master_of,
    opened,
    own,
    part,
    parts,
    run,
    same,
    same_structure,
    save_plain,
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
    trained(options, NATIVE, 1)  # what is made once
    wanted, dense, owned = trained(options, NATIVE, steps)
    found, packed, _ = trained(options, EXACT, steps)
    agree(found, wanted)
    assert dense - packed == 2 * owned > 0
    found, packed, _ = trained(options, AWAY, 2)
    assert dense - packed == 2 * owned
    for mine, other in zip(found[0], wanted[0], strict=False):
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


def formats():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    if hasattr(Optimizer, "sharded_param_state_fully_reshardable"):
        return ["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"]
    return ["fully_sharded_model_space", "dp_zero_gather_scatter"]


def sharded(form):
    from mindspeed.train import checkpoint

    return mock.patch.object(checkpoint, "_sharding_type", return_value=form)


def scramble(trainer):
    """Other values in every weight, master and moment."""
    optimizer = part(trainer)
    inner = optimizer.optimizer
    with torch.no_grad():
        for p in trainer.chunks[0].parameters():
            p.fill_(3)
        optimizer.reload_model_params()
        for state in inner.state.values():
            state["exp_avg"].fill_(7)


def consistent(trainer):
    """Every rank has the same weights, and they are the masters rounded."""
    mine = weights(trainer)
    for other in gathered(mine):
        same(mine, other)
    rounding = getattr(part(trainer).optimizer, "rounding", "rne")
    for name, (master, *_) in whole(trainer).items():
        weight = mine[name].reshape(-1)
        tied = master.view(torch.int32) & 0x1FFFF == 0x8000
        cast = master.to(torch.bfloat16)
        assert torch.equal(weight[~tied], cast[~tied])
        if rounding == "rne":
            assert torch.equal(weight, cast)
        else:
            assert (weight[tied] != cast[tied]).all()


def pairs(mine, theirs):
    return [(mine[name], theirs[name]) for name in mine]


def with_ties(trainer):
    """Masters half between two bf16 numbers, where the roundings differ."""
    optimizer = part(trainer)
    for _, p, inner in own(trainer).values():
        master = master_of(inner, p)
        bits = master.reshape(-1).view(torch.int32)
        bits[::3] = (bits[::3] & ~0x1FFFF) | 0x8000
        if hasattr(inner, "master"):
            inner.set_master(p, master)
        else:
            p.data.copy_(master)
    if hasattr(optimizer, "_gather"):
        optimizer._gather()
    else:
        optimizer._copy_main_params_to_model_params()
        for chunk in optimizer.model_chunks:
            chunk.start_param_sync(force_sync=True)


def check_saved(rank, world_size, folder):
    """Two ranks: every format brings every bit back; native runs read ours, and ours theirs."""
    with opened(OVERLAP, AWAY) as trainer:
        trainer.run(2)
        with_ties(trainer)
        consistent(trainer)
        kept, model = whole(trainer), weights(trainer)
        for form in formats():
            with sharded(form):
                trainer.save(f"{folder}/{form}")
        for form in formats():
            scramble(trainer)
            with sharded(form):
                trainer.load(f"{folder}/{form}")
            same(whole(trainer), kept)
            same(weights(trainer), model)
        save_plain(trainer, folder)
        scramble(trainer)
        load_plain(trainer, folder)
        same(whole(trainer), kept)
        same(weights(trainer), model)
        wanted = facts(trainer, 2)
    ours = f"{folder}/{formats()[0]}"
    with opened(OVERLAP, AWAY) as trainer:
        trainer.load(ours)
        same(whole(trainer), kept)
        agree(facts(trainer, 2), wanted)
    with opened(OVERLAP, NATIVE) as trainer:
        trainer.load(ours)
        same(whole(trainer), kept)
        trainer.run(1)
        with_ties(trainer)
        kept = whole(trainer)
        trainer.save(f"{folder}/theirs")
        wanted = facts(trainer, 2)
    same_files(ours, f"{folder}/theirs")
    for flags in (EXACT, AWAY):
        with opened(OVERLAP, flags) as trainer:
            trainer.load(f"{folder}/theirs")
            same(whole(trainer), kept)
            consistent(trainer)
            if flags is EXACT:
                agree(facts(trainer, 2), wanted)
    if rank == 0:
        torch.save(kept, f"{folder}/kept.pt")


def same_files(mine, theirs):
    """Checkpoints hold tensors of the same names, shapes and dtypes."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from mindspeed.train.state import checkpoint_folder

    def described(folder):
        found = load_tensors_metadata(str(checkpoint_folder(folder)))
        return {name: (t.dtype, t.global_shape) for name, t in found.items()}

    assert described(Path(mine)) == described(Path(theirs))


def check_three(rank, world_size, folder):
    """From two ranks to three, with the other rounding; on to one by the plain files."""
    with opened(SHARED, EXACT) as trainer:
        trainer.load(f"{folder}/theirs", reshard=True)
        same(whole(trainer), torch.load(f"{folder}/kept.pt"))
        consistent(trainer)
        trainer.run(1)
        save_plain(trainer, folder)
        kept = whole(trainer)
    if rank == 0:
        torch.save(kept, f"{folder}/kept.pt")


def check_one(rank, world_size, folder):
    with opened(SHARED, AWAY) as trainer:
        load_plain(trainer, folder)
        same(whole(trainer), torch.load(f"{folder}/kept.pt"))
        consistent(trainer)
        trainer.run(1)


@pytest.mark.megatron014
def test_resume_other_D(tmp_path):
    folder = str(tmp_path)
    run(check_saved, 2, folder)
    run(check_three, 3, folder)
    run(check_one, 1, folder)


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
    "mindspeed.features.memory.optim_megatron:HeldFloat16Optimizer.load_state_dict",
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
