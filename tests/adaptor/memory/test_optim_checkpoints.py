"""Checkpoints of --reuse-fp32-param: every format, other numbers of ranks, native runs and back."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from support.held_masters import (
    AWAY,
    EXACT,
    NATIVE,
    OVERLAP,
    SHARED,
    agree,
    consistent,
    facts,
    load_plain,
    master_of,
    opened,
    own,
    part,
    run,
    same,
    save_plain,
    weights,
    whole,
)


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
