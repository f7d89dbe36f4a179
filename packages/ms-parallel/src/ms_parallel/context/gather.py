"""All keys and values at every node at once: one step, no messages of its own."""

from __future__ import annotations

from .plan import Program, Step
from .tiles import Tiles


def gather_program(tiles: Tiles) -> Program:
    """Return the program after a gather, the same forward and backward.

    Every node computes its rows against the keys of all nodes, by owner. Before it K and V are
    gathered, after it, in backward, their gradients are summed and scattered.
    """
    size = tiles.nodes.size
    steps = []
    for node in range(size):
        blocks = tuple(b for owner in range(size) for b in tiles.blocks(node, owner))
        steps.append((Step(blocks=blocks),))
    return Program(tuple(steps), (), gather=True)
