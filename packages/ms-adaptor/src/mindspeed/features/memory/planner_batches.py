"""Micro-batches that profiling reads are kept for the training step that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class Recorded:
    """An iterator that can be read from its first element again.

    Args:
        source: read once, no further than somebody has read here.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[Any] = []

    def replay(self, copy: Callable[[Any], Any]) -> Iterator[Any]:
        """Return copies of the elements from the first on; new ones are taken from the source."""
        place = 0
        while True:
            if place == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield copy(self._seen[place])
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
        """Return the iterator of one chunk, from its first micro-batch on.

        Its tensors are new: a step in training gets them new as well, and they count.
        """
        found = self._recorded[chunk if len(self._recorded) > 1 else 0]
        return None if found is None else found.replay(_anew)

    def replay(self) -> Any:
        """Return iterators in the form of `data_iterator`, from their first micro-batches on."""
        shared: dict[int, Iterator[Any]] = {}
        found = [
            None if one is None else shared.setdefault(id(one), one.replay(_entries))
            for one in self._recorded
        ]
        return found if isinstance(self._given, list) else found[0]


def _entries(batch: Any) -> Any:
    """Copy a dictionary: some forward steps take entries out of it."""
    return dict(batch) if type(batch) is dict else batch


def _anew(batch: Any) -> Any:
    """Copy all tensors of a batch."""
    return tree_map_only(Tensor, Tensor.clone, batch)
