"""Host memory: sizes, reuse after the last copy, the cap."""

import pytest
import torch

from ms_memory import device
from ms_memory.errors import MemoryFeatureError
from ms_memory.ledger import HostLedger
from ms_memory.swap import HostPool
from ms_memory.swap.pool import PAGE, size_class


def test_size_classes_lose_an_eighth_at_most():
    for nbytes in (1, 4096, 4097, 32_768, 32_769, 40_000, 65_535, 1 << 20, (1 << 20) + 1, 3 << 29):
        size = size_class(nbytes)
        assert nbytes <= size < nbytes + max(PAGE, nbytes / 8)
        assert size_class(size) == size
    steps = {size_class(n) for n in range(1 << 16, 1 << 17, 512)}
    assert len(steps) <= 9


def test_a_block_is_lent_again_only_after_its_last_copy():
    sim = device.sim(schedule="late")
    pool = HostPool(sim)
    x = torch.ones(1024)
    first = pool.take(x.nbytes)
    sim.d2h.wait(sim.record())
    event = sim.d2h.copy([(first.view(x), x)])
    pool.give(first, event)
    second = pool.take(x.nbytes)
    assert second.memory is not first.memory
    event.wait()
    third = pool.take(x.nbytes)
    assert third.memory is first.memory
    assert third.view(x).isnan().all()  # what it held is nobody's any more
    assert (pool.held, pool.ledger.nbytes, pool.ledger.peak) == (8192, 8192, 8192)


def test_the_cap_reuses_then_frees_then_waits_then_refuses():
    sim = device.sim(schedule="late")
    ledger = HostLedger()
    pool = HostPool(sim, 2 * PAGE, ledger=ledger)
    x = torch.ones(PAGE // 4)
    small = [pool.take(PAGE), pool.take(PAGE)]
    with pytest.raises(MemoryFeatureError, match=r"E-M32.*8192 bytes are out, 4096 more exceed"):
        pool.take(PAGE)
    sim.d2h.wait(sim.record())
    event = sim.d2h.copy([(small[0].view(x), x)])
    pool.give(small[0], event)
    again = pool.take(PAGE)  # there is no room for another, so that it waits
    assert again.memory is small[0].memory
    assert event.done()
    for block in (again, small[1]):
        pool.give(block)
    large = pool.take(2 * PAGE)  # the small ones make room
    assert pool.held == 2 * PAGE
    pool.give(large)
    pool.clear()
    assert (pool.held, ledger.nbytes, ledger.total) == (0, 0, 5 * PAGE)


def test_a_ledger_that_refuses_leaves_the_pool_as_it_was():
    pool = HostPool(device.sim(), ledger=HostLedger(100))
    with pytest.raises(MemoryFeatureError, match="E-M32"):
        pool.take(101)
    block = pool.take(100)
    assert pool.held == PAGE
    pool.give(block)
    assert pool.ledger.nbytes == 0
    unpinned = HostPool(device.sim(), pin=False)
    assert unpinned.take(7).memory.numel() == PAGE
    assert unpinned.device.stats().pinned == 0
