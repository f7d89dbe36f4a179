"""Layouts: every token once, evenly, and there and back."""

import random

import pytest
import torch

from ms_parallel.context.layout import SeqLayout
from support.plans import random_documents, random_layout


@pytest.mark.parametrize("total", [0, 1, 7, 16, 61])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_lengths_differ_by_at_most_one(total, size):
    documents = (0, total // 3, total // 3, total // 2, total)
    for layout in (
        SeqLayout.contiguous(total, size),
        SeqLayout.zigzag(total, size),
        SeqLayout.zigzag_docs(documents, size),
    ):
        assert layout.size == size
        assert sum(layout.lengths) == total
        assert max(layout.lengths) - min(layout.lengths) <= 1


def test_zigzag_is_chunk_c_and_its_mirror():
    layout = SeqLayout.zigzag(24, 3)
    chunks = torch.arange(24).view(6, 4)
    for rank in range(3):
        assert torch.equal(layout.local_index(rank), chunks[[rank, 5 - rank]].flatten())


def test_zigzag_of_documents_is_zigzag_of_each():
    layout, documents = SeqLayout.zigzag_docs((0, 8, 24), 2), ((0, 8), (8, 24))
    for rank in range(2):
        parts = [SeqLayout.zigzag(b - a, 2).local_index(rank) + a for a, b in documents]
        assert torch.equal(layout.local_index(rank), torch.cat(parts))
        assert layout.cu_seqlens(rank, (0, 8, 24)) == (0, 4, 12)


def test_nodes_of_a_fine_zigzag_are_a_coarse_zigzag():
    # Chunks rU + u and 2P - 1 - (rU + u) of 2P, u < U, are chunks r and 2R - 1 - r of 2R.
    for ranks, places in ((4, 2), (6, 3), (8, 4), (8, 8)):
        fine, coarse = SeqLayout.zigzag(96, ranks), SeqLayout.zigzag(96, ranks // places)
        assert fine.grouped(places) == coarse


@pytest.mark.parametrize("seed", range(40))
def test_shards_are_a_partition_and_come_back(seed):
    rng = random.Random(seed)
    documents, size = random_documents(rng), rng.randint(1, 9)
    layout = random_layout(rng, documents, size)
    total = layout.total
    whole = torch.randn(2, total, 3)
    parts = [layout.shard(whole, rank, 1) for rank in range(size)]
    assert torch.equal(layout.unshard(parts, 1), whole)
    index = torch.cat([layout.local_index(rank) for rank in range(size)])
    assert torch.equal(index.sort().values, torch.arange(total))
    of_token = torch.searchsorted(torch.tensor(documents), torch.arange(total), right=True) - 1
    for rank in range(size):
        local = layout.local_index(rank)
        assert torch.equal(whole[:, local], parts[rank])
        assert torch.equal(layout.position_ids(rank), local)
        starts = torch.tensor(documents)[of_token[local]]
        assert torch.equal(layout.position_ids(rank, documents), local - starts)
        lengths = torch.tensor(layout.cu_seqlens(rank, documents)).diff()
        held = torch.bincount(of_token[local], minlength=len(documents) - 1)
        assert torch.equal(lengths, held)


def test_rows_of_a_batch_are_split_alike():
    layout, batch = SeqLayout.zigzag(13, 3), torch.arange(26).view(2, 13)
    flat = layout.rows(2)
    for rank in range(3):
        local = layout.shard(batch, rank, 1)
        assert torch.equal(flat.shard(batch.flatten(), rank), local.flatten())


def test_gradients_of_shards_are_shards_of_gradients():
    layout = SeqLayout.zigzag(12, 2)
    whole = torch.randn(12, requires_grad=True)
    weight = torch.randn(12)
    for rank in range(2):
        (layout.shard(whole, rank) * layout.shard(weight, rank)).sum().backward()
    assert torch.equal(whole.grad, weight)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SeqLayout(4, (((0, 2),), ((3, 4),))), r"\[3, 4\) after 2"),
        (lambda: SeqLayout(4, (((0, 2), (1, 4)),)), r"\[1, 4\) after 2"),
        (lambda: SeqLayout(4, (((0, 3),),)), "3 tokens at 1 processes, need 4"),
        (lambda: SeqLayout.zigzag(4, 0), "size: got 0"),
        (lambda: SeqLayout.contiguous(-1, 2), "total: got -1"),
        (lambda: SeqLayout.zigzag_docs((0, 5, 3), 2), r"cu_seqlens: got \(0, 5, 3\)"),
        (lambda: SeqLayout.zigzag(8, 4).grouped(3), "places: got 3, need a divisor of 4"),
        (lambda: SeqLayout.zigzag(8, 2).shard(torch.ones(7), 0), "7 along dimension 0, need 8"),
        (lambda: SeqLayout.zigzag(8, 2).unshard([torch.ones(4)] * 3), r"need tokens a rank"),
        (lambda: SeqLayout.zigzag(8, 2).position_ids(0, (0, 7)), "documents: got 7"),
        (
            lambda: SeqLayout.from_segments([[(4, 8), (0, 4)]]).cu_seqlens(0, (0, 4, 8)),
            "out of order",
        ),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
