"""Documents of a batch, and its parts: against a walk over the tokens, and a whole loss."""

import pytest
import torch

from ms_parallel.context.documents import (
    documents_from_positions,
    documents_from_tokens,
    shard_batch,
)
from ms_parallel.context.layout import SeqLayout


def walk(tokens, eod):
    """Boundaries, and the positions that restart, token by token."""
    ends, positions = [0], []
    for row in tokens:
        for token in row:
            positions.append(len(positions) - ends[-1])
            if token == eod:
                ends.append(len(positions))
        if ends[-1] != len(positions):
            ends.append(len(positions))
    return tuple(ends), torch.tensor(positions).view(tokens.shape)


CASES = {
    "none": [[1, 2, 3, 4]],
    "last": [[1, 0, 3, 0]],
    "first": [[0, 2, 3, 4]],
    "consecutive": [[1, 0, 0, 0]],
    "all": [[0, 0]],
    "rows": [[1, 0, 3], [4, 5, 6], [0, 8, 9]],
    "one token": [[5]],
}


@pytest.mark.parametrize("name", CASES)
def test_documents_of_tokens_and_of_positions(name):
    tokens = torch.tensor(CASES[name])
    expected, positions = walk(tokens, 0)
    assert documents_from_tokens(tokens, 0) == expected
    assert documents_from_positions(positions) == expected
    assert documents_from_tokens(tokens.flatten(), 0) == walk(tokens.view(1, -1), 0)[0]
    layout = SeqLayout.zigzag_docs(expected, 3)
    for rank in range(3):
        cut = layout.shard(positions.flatten(), rank)
        assert torch.equal(layout.position_ids(rank, expected), cut)


def test_no_tokens_are_one_empty_document():
    assert documents_from_tokens(torch.empty(0, dtype=torch.int64), 0) == (0, 0)
    assert documents_from_positions(torch.empty(2, 0, dtype=torch.int64)) == (0, 0)


def test_losses_of_the_parts_are_the_loss_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 13, 5, generator=generator, dtype=torch.float64)
    batch = {
        "labels": torch.randint(0, 5, (2, 13), generator=generator),
        "loss_mask": (torch.rand(2, 13, generator=generator) < 0.7).double(),
        "attention_mask": torch.ones(13, 13),
        "packed": None,
    }

    def loss(logits, labels, loss_mask):
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each * loss_mask).sum()

    expected = loss(logits, batch["labels"], batch["loss_mask"])
    layout = SeqLayout.zigzag(13, 4)
    total = 0
    for rank in range(4):
        part = shard_batch(batch, layout, rank)
        assert part["attention_mask"] is batch["attention_mask"]
        assert part["packed"] is None
        total += loss(layout.shard(logits, rank, 1), part["labels"], part["loss_mask"])
    assert torch.allclose(total, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: documents_from_tokens(torch.ones(1, 1, 1).long(), 0), r"int64 \[1, 1, 1\]"),
        (lambda: documents_from_positions(torch.ones(4)), r"float32 \[4\], need integers"),
        (
            lambda: shard_batch({"x": torch.ones(1, 5)}, SeqLayout.zigzag(6, 2), 0),
            "5 along dimension 1, need 6 tokens",
        ),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
