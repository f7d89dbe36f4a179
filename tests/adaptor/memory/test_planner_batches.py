"""Micro-batches that measuring read are trained on, and random numbers come as without it."""

import torch

from mindspeed.features.memory.planner.batches import Batches, draw, drawn
from support.mutation import Mutation, assert_caught


def rows(count=4):
    """A loader draws a seed for its workers when its first batch is asked for."""
    yield from torch.utils.data.DataLoader([{"tokens": torch.tensor(i)} for i in range(count)])


def plain(first, second):
    """What training sees: elements, with a random number after each."""
    for one in (first, second):
        yield int(next(one)["tokens"]), torch.rand(()).item()


def check_nothing_is_lost():
    torch.manual_seed(1)
    one, two = rows(), rows()
    expected = [*plain(one, two), *plain(one, two), *plain(one, two)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    given = [rows(), rows()]
    batches = Batches(given)
    for _ in range(2):  # two chunks are measured, the first one reads twice
        assert [int(next(it)["tokens"]) for it in batches.measured()] == [0, 0]
    measuring = batches.of(0)
    first = next(measuring)["tokens"]
    assert int(next(measuring)["tokens"]) == 1
    torch.set_rng_state(state)
    again = batches.trained()
    found = [*plain(*again), *plain(*again)]
    assert [*found, *plain(*given)] == expected
    assert first.data_ptr() != next(batches.of(0))["tokens"].data_ptr()


def test_nothing_is_lost():
    lost = Mutation(
        "draws are lost",
        "mindspeed.features.memory.planner.batches:Recorded.trained",
        "draw(words)",
        "pass",
    )
    assert_caught(lost, check_nothing_is_lost)


def test_words_between_two_states():
    before = torch.get_rng_state()
    torch.empty((), dtype=torch.int64).random_()
    torch.rand(5)
    after = torch.get_rng_state()
    words = drawn(before, after)
    torch.set_rng_state(before)
    draw(words)
    assert torch.equal(torch.get_rng_state(), after)
    assert drawn(before, before) == 0
    torch.manual_seed(7)
    assert drawn(before, torch.get_rng_state()) == 0


def test_chunks_may_share_an_iterator_and_ranks_may_have_none():
    shared = iter([{"tokens": torch.tensor(i)} for i in range(3)])
    batches = Batches([shared, shared])
    assert int(next(batches.of(1))["tokens"]) == 0
    first, second = batches.trained()
    assert first is second
    assert [int(e["tokens"]) for e in first] == [0, 1, 2]
    assert Batches(None).trained() is None
    assert Batches([None, None]).measured() == [None, None]
