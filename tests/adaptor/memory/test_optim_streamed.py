"""--swap-optimizer in Megatron's optimizers: the native bits, and where they lie between steps."""

import copy

import pytest
import torch

from support.held_masters import (
    NATIVE,
    OVERLAP,
    agree,
    facts,
    load_plain,
    opened,
    part,
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

SWAPPED = {"swap_optimizer": True, "swap_optimizer_times": 3}


def on_the_host(trainer):
    """Every master is an empty shell, and every state a tensor that the host keeps."""
    held = part(trainer).optimizer
    assert all(m.untyped_storage().nbytes() == 0 for m in held._weights)
    numel = sum(p.numel() for p in held._masters)
    assert held.streamed.host_nbytes() == 12 * numel
    share = -(-numel // 3)
    largest = max((p.numel() for p in held._masters), default=0)
    assert held.streamed.peak_bytes() <= 2 * 12 * max(share, largest)


def check_streamed(rank, world_size, options, folder):
    with opened(options, NATIVE) as trainer:
        wanted = facts(trainer, 10)
        theirs = copy.deepcopy(part(trainer).state_dict())
        save_plain(trainer, folder)
        list(step(trainer, 1))
        later = whole(trainer)
    with opened(options, SWAPPED) as trainer:
        agree(facts(trainer, 10), wanted)
        on_the_host(trainer)
        same_structure(part(trainer).state_dict(), theirs)
        skip(trainer)
        same(whole(trainer), wanted[1])
    with opened(options, SWAPPED) as trainer:
        load_plain(trainer, folder)
        same(whole(trainer), wanted[1])
        same(weights(trainer), wanted[2])
        on_the_host(trainer)
        list(step(trainer, 1))
        same(whole(trainer), later)
        save_plain(trainer, folder)
        saved_from_the_host(trainer)
        adopted(trainer)
    with opened(options, NATIVE) as trainer:
        load_plain(trainer, folder)
        same(whole(trainer), later)


def saved_from_the_host(trainer):
    """What a sharded checkpoint writes are the host's own tensors."""
    held = part(trainer)
    states = getattr(held, "get_parameter_state_dp_reshardable", None)
    if states is None:  # undivided, or megatron-core 0.14
        return
    _, *_, buffers = states().values()
    kept = {m.data_ptr() for m in held.optimizer.streamed.masters_on_host()}
    written = [p["param"].data_ptr() for buckets in buffers.values() for b in buckets for p in b]
    assert kept == set(written)


def adopted(trainer):
    """Weights that came without a state are the masters."""
    with torch.no_grad():
        for p in trainer.chunks[0].parameters():
            p.fill_(3)
    trainer.optimizer.reload_model_params()
    assert all((master == 3).all() for master, *_ in whole(trainer).values())
    on_the_host(trainer)


@pytest.mark.megatron014
@pytest.mark.parametrize(
    ("ranks", "options", "schedule"),
    [(1, {}, "late"), (1, {"bf16": False, "fp16": True}, "early"), (2, OVERLAP, "7")],
    ids=["whole", "fp16", "divided"],
)
def test_bitequal_inner(ranks, options, schedule, tmp_path):
    run(check_streamed, ranks, options, str(tmp_path), MS_MEMORY_SIM=schedule)


_HELD = "mindspeed.features.memory.optim.held_streamed:HeldStreamed"
SCHEDULE_LOST = Mutation(
    "the schedule does not reach the slices", f"{_HELD}.step", "wide.update", "dict().update"
)
MOMENTS_STAY = Mutation(
    "moments are left on the device",
    f"{_HELD}.__init__",
    "keys=MOMENTS",
    "keys=()",
)


@pytest.mark.parametrize("mistake", [SCHEDULE_LOST, MOMENTS_STAY], ids=["schedule", "moments"])
def test_mistakes_are_caught(mistake, tmp_path):
    with pytest.raises(RankError, match="AssertionError"):
        run(check_streamed, 1, {}, str(tmp_path), mutate=[mistake], MS_MEMORY_SIM="late")


def check_processor(rank, world_size):
    with pytest.raises(RuntimeError, match="MS_MEMORY_SIM"), opened({}, SWAPPED):
        pass


def test_a_processor_is_no_other_place():
    run(check_processor, 1)
