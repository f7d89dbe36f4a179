"""Which layers are recomputed, against the plain statement of the rule."""

from itertools import product

import pytest

from ms_memory.recompute import layer_action


def brute(layers, chunks, full, part, per_rank):
    """Order the layers by hand and cut the order."""
    every = list(product(range(layers), range(chunks)))  # first layer of each chunk, then second
    ranked = [every] if per_rank else [[(i, c) for i in range(layers)] for c in range(chunks)]
    found = {}
    for order in ranked:
        rest = order[full:]
        cut = len(rest) if part is None else part
        found |= dict.fromkeys(order[:full], "full")
        found |= dict.fromkeys(rest[:cut], "part")
        found |= dict.fromkeys(rest[cut:], "keep")
    return found


def test_layer_priority_table():
    count = 0
    for layers, chunks, per_rank in product(range(1, 9), range(1, 5), (False, True)):
        total = layers * (chunks if per_rank else 1)
        for full, part in product({0, 1, total // 2, total}, {None, 0, 1, total // 2}):
            expected = brute(layers, chunks, full, part, per_rank)
            for (layer, chunk), action in expected.items():
                found = layer_action(
                    layer, chunk_layers=layers, full=full, part=part, chunks=chunks, chunk=chunk,
                    per_rank=per_rank,
                )  # fmt: skip
                assert found == action
                count += 1
    assert count > 10_000


@pytest.mark.parametrize(
    "wrong", [{"layer": -1}, {"full": -1}, {"part": -2}, {"chunk": 2}, {"chunk_layers": 0}]
)
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match="layer_action"):
        layer_action(**{"layer": 0, "chunk_layers": 2, "chunks": 2, **wrong})
