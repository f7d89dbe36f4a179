"""Process groups without processes: shapes, groups and orders at 8 to 1024 ranks.

Collectives return at once and move nothing, so values mean nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

T = TypeVar("T")


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """Be `rank` of `world_size` for the length of a `with` block.

    Raises:
        RuntimeError: A default group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("a default process group exists already; fake_world needs its place")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_each_rank(fn: Callable[[int], T], world_size: int) -> list[T]:
    """Call `fn(rank)` as every rank of a fake world in turn; returns the results by rank."""
    results = []
    for rank in range(world_size):
        with fake_world(world_size, rank):
            results.append(fn(rank))
    return results
