"""Micro-batches that profiling reads are kept for the training step that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

MOST_DRAWS = 4096  # words that reading one element may draw


class Recorded:
    """An iterator that can be read from its first element again.

    Reading may draw random numbers, as a loader does for the seed of its workers when it begins. In
    training an element that was read before draws as many again, so that what follows is drawn as
    if it was read there for the first time.

    Args:
        source: read once, no further than somebody has read here.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[tuple[Any, int]] = []

    def _read(self) -> None:
        before = torch.get_rng_state()
        element = next(self._source)
        self._seen.append((element, drawn(before, torch.get_rng_state())))

    def measured(self) -> Iterator[Any]:
        """Return the elements from the first on, with tensors of their own.

        A step in training gets new tensors as well, and they count.
        """
        for element, _ in self._elements():
            yield tree_map_only(Tensor, Tensor.clone, element)

    def trained(self) -> Iterator[Any]:
        """Return the elements from the first on, as the source would."""
        known = len(self._seen)
        for place, (element, words) in enumerate(self._elements()):
            if place < known:
                draw(words)
            # Some forward steps take entries out.
            yield dict(element) if type(element) is dict else element

    def _elements(self) -> Iterator[tuple[Any, int]]:
        place = 0
        while True:
            if place == len(self._seen):
                try:
                    self._read()
                except StopIteration:
                    return
            yield self._seen[place]
            place += 1


class Batches:
    """The data iterators of a schedule's call, recorded.

    Args:
        given: `data_iterator` of the call: an iterator, None, or a list with one of these a chunk.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        every = given if isinstance(given, list) else [given]
        # Chunks may share an iterator: then they share what it gave.
        recorded = {id(one): Recorded(one) for one in every if one is not None}
        self._recorded = [None if one is None else recorded[id(one)] for one in every]

    def of(self, chunk: int) -> Iterator[Any] | None:
        """Return the iterator of one chunk to measure with, from its first micro-batch on."""
        found = self._recorded[chunk if len(self._recorded) > 1 else 0]
        return None if found is None else found.measured()

    def measured(self) -> Any:
        """Return iterators in the form of `data_iterator` to measure with."""
        return self._again(Recorded.measured)

    def trained(self) -> Any:
        """Return iterators in the form of `data_iterator` to train with, nothing lost."""
        return self._again(Recorded.trained)

    def _again(self, read: Callable[[Recorded], Iterator[Any]]) -> Any:
        shared: dict[int, Iterator[Any]] = {}
        found = [
            None if one is None else shared.setdefault(id(one), read(one)) for one in self._recorded
        ]
        return found if isinstance(self._given, list) else found[0]


def drawn(before: Tensor, after: Tensor) -> int:
    """Return how many words of the processor's generator lie between two of its states.

    More than `MOST_DRAWS`, or a new seed, count as none.
    """
    if torch.equal(before, after):
        return 0
    generator = torch.Generator()
    generator.set_state(before)
    word = torch.empty(1, dtype=torch.int32)
    for count in range(1, MOST_DRAWS + 1):
        word.random_(generator=generator)
        if torch.equal(generator.get_state(), after):
            return count
    return 0


def draw(words: int) -> None:
    """Let the processor's generator go on by some words."""
    torch.empty(words, dtype=torch.int32).random_()
