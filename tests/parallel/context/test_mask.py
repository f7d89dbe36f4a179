"""Masks and heads against their definitions, entry by entry."""

import itertools
import random

import pytest
import torch

from ms_parallel.context.heads import kv_head_plan
from ms_parallel.context.layout import SeqLayout
from ms_parallel.context.mask import AttnMask, DenseMask
from ms_parallel.context.tiles import Tiles, join_full
from support.plans import random_documents, random_mask


@pytest.mark.parametrize("seed", range(60))
def test_rectangles_are_what_the_matrix_says(seed):
    rng = random.Random(seed)
    documents = random_documents(rng)
    mask, total = random_mask(rng, documents), documents[-1]
    matrix = mask.matrix(total)
    assert mask.cells(total) == matrix.sum()
    if mask.documents:
        documents = mask.documents
        at = rng.randrange(len(documents) - 1)
        low, high = documents[at], documents[at + 1]
    else:
        low, high = 0, total
    for _ in range(5):
        q0, q1 = sorted(rng.randint(low, high) for _ in range(2))
        k0, k1 = sorted(rng.randint(low, high) for _ in range(2))
        tile = matrix[q0:q1, k0:k1]
        seen = mask.rectangle(q0, q1, k0, k1)
        if seen is None:
            assert not tile.any()
            continue
        a, b, c, d, kind, cells = seen
        assert cells == tile.sum() == matrix[a:b, c:d].sum()
        assert q0 <= a < b <= q1
        assert k0 <= c < d <= k1
        if kind == "full":
            assert matrix[a:b, c:d].all()
        if kind == "causal":
            assert torch.equal(matrix[a:b, c:d], torch.ones(b - a, b - a).tril().bool())
        span = mask.span(q0, q1)
        assert not matrix[q0:q1, : span[0]].any()
        assert not matrix[q0:q1, span[1] :].any()


def test_masks_are_compared_by_content():
    matrix = torch.rand(6, 6) < 0.5
    one, two = AttnMask.from_matrix(matrix), AttnMask.from_matrix(matrix.clone())
    other = AttnMask.from_matrix(~matrix)
    assert one == two
    assert hash(one) == hash(two)
    assert one != other
    transposed = AttnMask.from_matrix(matrix.t())
    assert transposed == AttnMask.from_matrix(matrix.t().contiguous())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AttnMask(left=-1), "left: got -1"),
        (lambda: AttnMask.causal((1, 4)), r"documents: got \(1, 4\)"),
        (lambda: AttnMask(right=0, dense=DenseMask(torch.ones(2, 2).bool())), "a matrix alone"),
        (lambda: AttnMask.from_matrix(torch.ones(2, 3).bool()), r"bool \[2, 3\], need bool"),
        (lambda: AttnMask.from_matrix(torch.ones(2, 2)), r"float32 \[2, 2\], need bool"),
        (lambda: AttnMask.from_matrix(torch.ones(2, 2, device="meta").bool()), "meta, need"),
        (lambda: AttnMask.causal((0, 4)).check(5), "documents: got 4"),
        (
            lambda: AttnMask.from_matrix(torch.ones(2, 2).bool()).check(3),
            r"\[2, 2\], need \[3, 3\]",
        ),
    ],
)
def test_bad_masks(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_no_matrix_is_needed_for_documents():
    # Cut at documents and at ownership, causal tiles are whole, empty or squares.
    for seed in range(60):
        rng = random.Random(seed)
        documents, size = random_documents(rng), rng.randint(2, 5)
        ends = [0, *sorted(rng.randint(0, documents[-1]) for _ in range(3 * size)), documents[-1]]
        shards = [[] for _ in range(size)]
        for part in itertools.pairwise(ends):
            rng.choice(shards).append(part)
        tiles = Tiles(SeqLayout.from_segments(shards), AttnMask.causal(documents))
        kinds = {b.kind for q in range(size) for k in range(size) for b in tiles.blocks(q, k)}
        assert kinds <= {"full", "causal"}


def test_full_blocks_join_in_rows_and_keys():
    layout = SeqLayout.zigzag(16, 2)
    tiles = Tiles(layout, AttnMask.full(), [2, 6, 14])
    blocks = tiles.blocks(0, 1)
    assert len(blocks) == 4 * 2
    apart = join_full(blocks)
    assert [(b.q0, b.q1, b.k0, b.k1, b.q_pos) for b in apart] == [(0, 4, 0, 8, 0), (4, 8, 0, 8, 12)]
    (one,) = join_full(blocks, across_gaps=True)
    assert (one.q0, one.q1, one.k0, one.k1, one.cells) == (0, 8, 0, 8, 64)


@pytest.mark.parametrize(
    ("heads", "places", "q", "kv"),
    [
        ((8, 8), 4, [2, 2, 2, 2], [2, 2, 2, 2]),
        ((8, 2), 4, [2, 2, 2, 2], [1, 1, 1, 1]),
        ((24, 6), 4, [6, 6, 6, 6], [2, 2, 2, 2]),
        ((6, 6), 4, [2, 2, 1, 1], [2, 2, 1, 1]),
        ((64, 8), 16, [4] * 16, [1] * 16),
        ((2, 1), 4, [1, 1, 0, 0], [1, 1, 0, 0]),
    ],
)
def test_places_get_the_heads_their_queries_read(heads, places, q, kv):
    plan = kv_head_plan(*heads, places)
    assert [b - a for a, b in plan.q] == q
    assert [b - a for a, b in plan.kv] == kv
    assert (plan.q_heads, plan.kv_heads) == heads
    assert plan.shared == (sum(kv) > heads[1])
    group = heads[0] // heads[1]
    for (a, b), (c, d) in zip(plan.q, plan.kv, strict=True):
        assert {h // group for h in range(a, b)} == set(range(c, d))


def test_bad_heads():
    with pytest.raises(ValueError, match=r"\(7, 2\), need query heads that are a multiple"):
        kv_head_plan(7, 2, 2)
    with pytest.raises(ValueError, match="places: got 0"):
        kv_head_plan(8, 2, 0)
