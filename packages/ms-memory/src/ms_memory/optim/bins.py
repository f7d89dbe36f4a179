"""Cutting the parameters of a step into groups that pass through the device one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def bins(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """Return indices in order, cut so that each list has at most a share or is one index.

    Args:
        sizes: elements of each parameter.
        groups: a share is the sum of all sizes over this, rounded up.
    """
    share = -(-sum(sizes) // groups)
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = share
        found[-1].append(index)
        room -= size
    return found


def peak(nbytes: Sequence[int], double_buffer: bool) -> int:
    """Return the most bytes on the device while groups of some bytes pass through it.

    One group at a time; with two buffers each group and the next one, which is on its way in while
    the group before leaves.
    """
    pairs = [a + b for a, b in pairwise(nbytes)] if double_buffer else []
    return max((*pairs, *nbytes), default=0)
