"""Which layer is recomputed as a whole, which in part."""

from __future__ import annotations

from typing import Literal

LayerAction = Literal["full", "part", "keep"]


def layer_action(
    layer: int,
    *,
    chunk_layers: int,
    full: int = 0,
    part: int | None = None,
    chunks: int = 1,
    chunk: int = 0,
    per_rank: bool = False,
) -> LayerAction:
    """Say what happens to one layer of a pipeline rank.

    The layers of a rank have a priority: the first `full` are recomputed as a whole, the next
    `part` in part (activation or norms), the rest keep what they save.

        priority = (layer mod chunk_layers) * chunks + chunk     per rank
        priority = layer mod chunk_layers                        per chunk

    Args:
        layer: index inside its chunk, from 0.
        chunk_layers: layers of a chunk.
        full: how many are recomputed as a whole.
        part: how many after these in part; None: all the rest.
        chunks: chunks of this rank (virtual pipeline).
        chunk: which of them.
        per_rank: count over all chunks of the rank instead of in each.

    Raises:
        ValueError: a number out of range.
    """
    numbers = {"layer": layer, "full": full, "part": part or 0, "chunk": chunk}
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"layer_action: {name}: got {value}, need 0 or more")
    if chunk_layers < 1 or chunk >= chunks:
        got = f"{chunk_layers} layers in chunk {chunk} of {chunks}"
        raise ValueError(f"layer_action: chunk: got {got}, need one below the number of chunks")
    priority = layer % chunk_layers
    if per_rank:
        priority = priority * chunks + chunk
    if priority < full:
        return "full"
    return "part" if part is None or priority < full + part else "keep"
