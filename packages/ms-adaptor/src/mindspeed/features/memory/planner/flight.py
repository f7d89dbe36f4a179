"""How many micro-batches lie between their forward and backward, from Megatron's schedules."""

from __future__ import annotations


def in_flight(
    stages: int, stage: int, chunks: int, micro_batches: int, group: int | None = None
) -> tuple[int, ...]:
    """Return the most micro-batches of each chunk whose activations a rank holds at one time.

    Without virtual stages that is min(stages - stage, micro_batches). With them the schedule is
    replayed: warm-up of 2 (stages - stage - 1) + (chunks - 1) group forwards, then one forward and
    one backward in turns. The most of a chunk; the chunks need not have theirs at the same time.

    Args:
        stages: pipeline ranks.
        stage: this one.
        chunks: of this rank (virtual stages).
        micro_batches: of a step.
        group: micro-batches that a chunk takes in a row; None: as many as stages.
    """
    if chunks == 1:
        return (min(stages - stage, micro_batches),)
    return tuple(map(max, *held(stages, stage, chunks, micro_batches, group or stages)))


def held(
    stages: int, stage: int, chunks: int, micro_batches: int, group: int
) -> list[tuple[int, ...]]:
    """Return how many micro-batches each chunk holds after every forward, for virtual stages.

    Args:
        stages: as for `in_flight`, and what follows.
        stage: likewise.
        chunks: likewise.
        micro_batches: likewise.
        group: likewise.
    """
    order = _order(chunks, micro_batches, group)
    warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * group, len(order))
    now, found = [0] * chunks, []
    for place, chunk in enumerate(order):
        now[chunk] += 1
        found.append(tuple(now))
        if place >= warm_up:
            now[chunks - 1 - order[place - warm_up]] -= 1
    return found


def _order(chunks: int, micro_batches: int, group: int) -> list[int]:
    """Return the chunk of every forward; backwards have it reversed."""
    starts = range(0, micro_batches, group)
    sizes = [min(group, micro_batches - start) for start in starts]
    return [chunk for size in sizes for chunk in range(chunks) for _ in range(size)]
