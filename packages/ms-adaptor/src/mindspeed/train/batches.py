"""Where micro batches come from: a sample source, and iterators that hold no state of their own.

A source is anything with `source[index]` returning the dictionary of Megatron's GPTDataset
(tokens, labels, loss_mask, position_ids, each of shape [seq_length]). Which samples a micro batch
holds follows from the step alone, so a resumed run needs no saved iterator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleSource(Protocol):
    """Samples by index."""

    def __len__(self) -> int:
        """The number of different samples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """The sample `index`: tensors of shape [seq_length]."""
        ...


@dataclass(frozen=True)
class SyntheticSamples:
    """Counting sequences with a random start and stride, and some noise: easy to learn.

    Args:
        seq_length: tokens of a sample.
        vocab_size: tokens lie in [0, vocab_size).
        seed: sample `i` depends on the seed and on `i` alone.
        size: the number of samples.
    """

    seq_length: int
    vocab_size: int
    seed: int = 0
    size: int = 1 << 20

    def __len__(self) -> int:
        """The number of samples."""
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample `index`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def draw(high: int, count: int = 1) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        steps = torch.arange(self.seq_length + 1)
        text = (draw(self.vocab_size) + steps * (1 + draw(3))) % self.vocab_size
        noisy = draw(10, self.seq_length + 1) == 0
        text = torch.where(noisy, draw(self.vocab_size, self.seq_length + 1), text)
        return {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


@dataclass(frozen=True)
class MicroBatches:
    """The micro batches of one data-parallel rank.

    Args:
        source: the samples.
        micro_batch_size: samples in a micro batch.
        rank: this copy's index among `copies` copies of the model.
        copies: the data-parallel size.
        device: where the tensors are put.
    """

    source: SampleSource
    micro_batch_size: int
    rank: int
    copies: int
    device: torch.device

    def at(self, index: int) -> dict[str, Tensor]:
        """Micro batch `index` of this rank: fields of shape [micro_batch_size, seq_length]."""
        first = (index * self.copies + self.rank) * self.micro_batch_size
        size = len(self.source)
        samples = [self.source[(first + i) % size] for i in range(self.micro_batch_size)]
        return {
            name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]).to(self.device)
            for name in _FIELDS
        }

    def iterate(self, start: int) -> Iterator[dict[str, Tensor]]:
        """Micro batches from `start` on, without end."""
        index = start
        while True:
            yield self.at(index)
            index += 1
