"""Fake worlds: groups of hundreds of ranks in one process, nothing left behind."""

import time

import pytest
import torch
import torch.distributed as dist

from support.fake import fake_world, on_each_rank


def test_world_and_groups_at_1024_ranks():
    start = time.monotonic()
    with fake_world(1024, rank=517):
        assert (dist.get_rank(), dist.get_world_size()) == (517, 1024)
        mine = None
        for first in range(0, 1024, 8):
            group = dist.new_group(list(range(first, first + 8)))
            if 517 in range(first, first + 8):
                mine = group
        assert dist.get_process_group_ranks(mine) == list(range(512, 520))
        assert dist.get_rank(mine) == 5
        out = torch.empty(8 * 3)
        dist.all_gather_into_tensor(out, torch.ones(3), group=mine)  # returns without peers
    assert not dist.is_initialized()
    assert time.monotonic() - start < 30


def test_on_each_rank():
    assert on_each_rank(lambda rank: (rank, dist.get_rank(), dist.get_world_size()), 8) == [
        (rank, rank, 8) for rank in range(8)
    ]


def test_nested_world_is_refused_and_the_outer_kept():
    with fake_world(4):
        with pytest.raises(RuntimeError, match="exists already"), fake_world(2):
            pass
        assert dist.get_world_size() == 4


def test_world_ends_after_an_exception():
    with pytest.raises(ZeroDivisionError), fake_world(8):
        1 / 0  # noqa: B018
    assert not dist.is_initialized()
