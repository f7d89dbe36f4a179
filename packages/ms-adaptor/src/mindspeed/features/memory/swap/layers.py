"""Which layers of a chunk are swapped, and of which the MLP is recomputed beside that."""

from __future__ import annotations

from ms_memory.recompute.priority import layer_action


def first_layers(number: int, layers: int, *, chunks: int = 1, chunk: int = 0) -> list[int]:
    """Return which layers of a chunk are among the first ones of its pipeline rank.

    A rank's layers count in turn over its chunks: the first of each chunk, then the second of each.

    Args:
        number: how many of all layers of the rank.
        layers: of the chunk.
        chunks: of the rank.
        chunk: which of them.

    Returns:
        Indices in the chunk, ascending.
    """
    actions = (
        layer_action(
            i, chunk_layers=layers, full=number, part=0, chunks=chunks, chunk=chunk, per_rank=True
        )
        for i in range(layers)
    )
    return [i for i, action in enumerate(actions) if action == "full"]


def swapped_layers(
    number: int | None, layers: int, *, chunks: int = 1, chunk: int = 0, last: bool = False
) -> list[int]:
    """Return the layers of a chunk whose saved tensors go to the host.

    Args:
        number: how many of all layers of the rank; None: all but the model's last one, whose
            backward follows at once, where the chunk has others.
        layers: of the chunk.
        chunks: of the rank.
        chunk: which of them.
        last: the chunk ends the model.
    """
    if number is not None:
        return first_layers(number, layers, chunks=chunks, chunk=chunk)
    return list(range(layers - 1 if last and layers > 1 else layers))
