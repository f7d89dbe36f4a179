"""Which ranks are traced, and where this process stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.distributed as dist

__all__ = ["Ranks", "place", "traces"]

Ranks = Literal["all"] | Sequence[int] | Callable[[int], bool]


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks: as given, else the default group's, else 0 of 1.

    Raises:
        ValueError: the rank is not one of the world.
    """
    joined = dist.is_available() and dist.is_initialized()
    if world_size is None:
        world_size = dist.get_world_size() if joined else max(1, (rank or 0) + 1)
    if rank is None:
        rank = dist.get_rank() if joined else 0
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of the {world_size} ranks of the world")
    return rank, world_size


def traces(ranks: Ranks, rank: int, world_size: int) -> bool:
    """Whether `rank` is one of `ranks`.

    Args:
        ranks: "all", global ranks (-1 among them means all), or a function of the rank.
        rank: the rank in question.
        world_size: number of ranks.

    Raises:
        TypeError: `ranks` is none of these.
        ValueError: there is no such rank, or none at all.
    """
    if callable(ranks):
        return bool(ranks(rank))
    if ranks == "all":
        return True
    if isinstance(ranks, str) or not isinstance(ranks, Sequence):
        raise TypeError(f"ranks must be 'all', a list of ranks or a function, got {ranks!r}")
    if not ranks:
        raise ValueError("ranks is empty: name a rank, or -1 for all")
    for each in ranks:
        if not isinstance(each, int) or isinstance(each, bool):
            raise TypeError(f"ranks must hold integers, got {each!r}")
        if not -1 <= each < world_size:
            raise ValueError(
                f"ranks names rank {each}, but the world has the ranks 0 to {world_size - 1}"
                " (-1 means all)"
            )
    return -1 in ranks or rank in ranks
