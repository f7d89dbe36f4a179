"""MemoryMeter: which storages count, with which sizes, on which devices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ms_profile.memory import MemoryMeter
from ms_profile.tap import unmetered
from support.mutation import Mutation, assert_caught


def test_storage_resized_behind_torchs_back():
    """A storage emptied by Python code announces it to nobody, yet no peak may count it."""

    def check():
        with MemoryMeter() as meter:
            a = torch.zeros(1000)
            a.untyped_storage().resize_(0)
            b = torch.zeros(500)
            assert meter.live == 2000
            a.untyped_storage().resize_(2000)
            torch.zeros(1)
            assert meter.live == 4000
            assert meter.peak.nbytes == 4004
            del a, b
        assert [live for _, _, live in meter.timeline] == [0, 4000, 2000, 4004]

    no_sweep = Mutation(
        "sizes are not looked at",
        "ms_profile.memory.watch:PeakWatch.expects",
        "self.sweep()",
        "pass",
    )
    assert_caught(no_sweep, check)


@pytest.mark.parametrize(
    ("resizes", "peak", "exact"), [(True, 6000, True), (False, 6400, False), (None, 6400, False)]
)
def test_a_late_look_at_sizes_makes_the_peak_an_upper_bound(resizes, peak, exact, monkeypatch):
    """With few storages each new peak looks; with many only some do, until one was found out."""
    monkeypatch.setattr("ms_profile.memory.watch._FEW", 1)
    monkeypatch.setattr("ms_profile.memory.watch._RARELY", 1)
    with MemoryMeter(resizes=resizes) as meter:
        kept = [torch.zeros(100) for _ in range(15)]
        kept[0].untyped_storage().resize_(0)
        kept.append(torch.zeros(100))
        assert meter.live == 6000
        found = meter.peak
        assert (found.nbytes, found.exact) == (peak, exact)
        assert found.snapshot.nbytes == found.nbytes
        if resizes is None:  # from now on it looks every time
            kept[1].untyped_storage().resize_(0)
            kept += [torch.zeros(100) for _ in range(3)]
            assert (meter.peak.nbytes, meter.peak.exact) == (6800, True)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("make"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("resize"), st.integers(0, 9), st.floats(0, 1)),
    ),
    max_size=30,
)


@settings(deadline=None)  # the first call of a process imports much
@given(STEPS)
def test_any_order_of_births_deaths_and_sizes(steps):
    """Peak, its holdings and the live bytes equal a plain recount."""
    tensors, full, best, alive_then = [], [], 0, []
    with MemoryMeter() as meter:
        for what, number, share in steps:
            if what == "make":
                tensors.append(torch.empty(number))
                full.append(4 * number)
                sizes = [each.untyped_storage().nbytes() for each in tensors]
                if sum(sizes) > best:
                    best, alive_then = sum(sizes), sizes
            elif what == "drop" and tensors:
                del tensors[number % len(tensors)], full[number % len(full)]
            elif tensors:
                place = number % len(tensors)
                tensors[place].untyped_storage().resize_(int(share * full[place]))
        live = sum(each.untyped_storage().nbytes() for each in tensors)
        assert meter.live == live
        peak = meter.peak
    assert (peak.nbytes, peak.exact) == (best, True)
    assert sorted(each.nbytes for each in peak.snapshot.holdings) == sorted(alive_then)
    tensors.clear()
    assert sorted(each.nbytes for each in meter.peak.snapshot.holdings) == sorted(alive_then)


def test_operators_that_resize_or_replace_a_storage():
    with MemoryMeter() as meter:
        a = torch.zeros(10)
        a.resize_(100)
        assert meter.live == 400
        a.set_(torch.zeros(7))
        assert meter.live == 28
        a.data = torch.zeros(3)
        assert meter.live == 12
        del a
        assert meter.live == 0
    assert meter.peak.nbytes == 428


def check_what_existed_before():
    old = torch.zeros(100)
    with MemoryMeter() as meter:
        old.view(10, 10).t().add_(1)
        old.mul_(2)
        torch.add(old, 1, out=old)
        torch._foreach_add_([old], 1.0)
        assert meter.live == meter.peak.nbytes == 0
        assert torch.tensor([1.0, 2.0]) is not None
        assert meter.peak.nbytes == 8
    assert MemoryMeter(old).live == 0  # not entered
    with MemoryMeter(old) as meter:
        assert meter.live == 400


def test_what_exists_before_counts_only_if_given():
    as_new = Mutation(
        "views of arguments count as new",
        "ms_profile.memory.made:_among",
        "return True",
        "return False",
        count=3,
    )
    assert_caught(as_new, check_what_existed_before)


def test_views_and_lists_count_once():
    with MemoryMeter() as meter:
        parts = torch.zeros(30).split(10)
        assert meter.live == 120
        many = torch._foreach_add(list(parts), 1.0)
        assert meter.live == 240
        del parts, many
        assert meter.live == 0


def test_sparse_parts_count():
    with MemoryMeter() as meter:
        indices, values = torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0])
        sparse = torch.sparse_coo_tensor(indices, values, (4,), check_invariants=False)
        assert meter.live == 16 + 8
        twice = sparse * 2
        assert meter.live == meter.peak.nbytes == 2 * (16 + 8)
        del twice, sparse, indices, values
        assert meter.live == 0


class CompiledFunction(torch.autograd.Function):
    """Stands for a region of torch.compile: its name, and results that no operator made."""

    @staticmethod
    def forward(ctx, x):
        with unmetered():
            inner = x + 1
            y = inner * inner
        ctx.save_for_backward(inner, x)
        return y

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_results_of_compiled_regions_count_when_they_are_used():
    leaf = torch.randn(6, 10, requires_grad=True)
    with MemoryMeter(exclude=leaf) as meter:
        y = CompiledFunction.apply(leaf)
        assert meter.live == 0
        z = torch.cat([y, y])
        assert meter.live == 2 * 240 + 480  # the result, what was saved, and this one
        assert meter.mark("forward", outputs=[y, z]).saved == 240
        z.sum().backward()
        del y, z
        assert meter.leaks() == ()
    made = [each for each in meter.peak.snapshot.holdings if each.birth.op == "torch.compile"]
    assert [each.nbytes for each in made] == [240, 240]


def test_one_device_only():
    with MemoryMeter(device="meta") as meta, MemoryMeter() as both, MemoryMeter(device="cuda:1"):
        a = torch.zeros(10, device="meta") + 1
        b = torch.zeros(10)
        assert (meta.live, both.live) == (40, 80)
        assert both.mark("now").by_device == {"meta": 40, "cpu": 40}
        del a, b


def test_one_of_several_devices_of_a_type():
    with FakeTensorMode():
        given = torch.zeros(5, device="cuda:1"), torch.zeros(5, device="cuda:0")
        with (
            MemoryMeter(*given, device="cuda:1") as one,
            MemoryMeter(*given, device="cuda") as both,
        ):
            a = torch.zeros(10, device="cuda:0")
            b = torch.zeros(20, device="cuda:1")
            assert (one.live, both.live) == (100, 160)
            assert both.snapshot().by_device == {"cuda:0": 60, "cuda:1": 100}
        del a, b
