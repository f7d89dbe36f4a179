"""MemoryMeter: live bytes, peak, marks and leaks of small programs, worked out by hand."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from ms_profile.memory import MemoryMeter
from support.mutation import Mutation, assert_caught

T, H, F = 24, 16, 40  # tokens, width, hidden width
X, A, W = 4 * T * H, 4 * T * F, 4 * H * F  # input, hidden tensor, weight: bytes in fp32


def two_layers():
    return nn.Sequential(nn.Linear(H, F, bias=False), nn.ReLU(), nn.Linear(F, H, bias=False))


def train_step(model, optimizer, x):
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def check_timeline():
    model, x = two_layers(), torch.randn(T, H)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryMeter(model, optimizer, x) as meter:
        train_step(model, optimizer, x)
    start = 2 * W + X
    loss = 4
    assert [live for _, _, live in meter.timeline] == [
        start,
        start + A,  # first product
        start + 2 * A,  # relu, which keeps its result
        start + A,  # the product is gone
        start + A + X,  # second product
        start + A + X + loss,  # sum, which keeps sizes only
        start + A + 2 * loss,  # backward's first gradient
        start + A + 2 * loss + W,  # gradient of the second weight
        start + 2 * A + 2 * loss + W,  # gradient of relu's result
        start + 3 * A + 2 * loss + W,  # gradient of the product: the peak
        start + A + 2 * loss + W,
        start + A + 2 * loss + 2 * W,  # gradient of the first weight
        start + 2 * loss + 2 * W,
        start + loss + 2 * W,
        start + loss,  # gradients are set to none
    ]
    assert meter.live == start  # this function's loss is gone as well
    assert meter.peak.nbytes == start + 3 * A + 2 * loss + W
    assert (meter.saved_peak, meter.saved_total) == (A + loss, A + loss)


def test_a_whole_training_step():
    check_timeline()


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "freed memory stays",
            "ms_profile.memory.census:StorageCensus._died",
            "self.nbytes -= held.nbytes",
            "pass",
        ),
        Mutation(
            "the seed of backward counts as kept",
            "ms_profile.memory.meter:MemoryMeter._phase_changes",
            'self._seed.kind = "other"',
            "pass",
        ),
        Mutation(
            "what is given is not counted",
            "ms_profile.memory.meter:MemoryMeter.opened",
            "self._follow(tensor, kind)",
            "pass",
        ),
    ],
    ids=lambda mutation: mutation.name,
)
def test_a_broken_meter_is_caught(mutation):
    assert_caught(mutation, check_timeline)


def test_the_peak_has_its_moment_and_what_was_alive():
    model, x = two_layers(), torch.randn(T, H)
    with MemoryMeter(model, x) as meter:
        model(x).sum().backward()
    peak = meter.peak
    assert (peak.op, peak.phase, peak.module) == (
        "aten.threshold_backward.default",
        "backward",
        "Sequential.1",
    )
    assert peak.snapshot.nbytes == peak.nbytes
    assert peak.snapshot.by_kind == {
        "parameter": 2 * W,
        "input": X,
        "activation": A + 4,
        "gradient": W,
        "other": 2 * A + 4,
    }
    assert peak.snapshot.by_module == {
        "": 2 * W + X + 8,
        "Sequential.1": 2 * A,
        "Sequential.2": A + W,
    }
    assert peak.snapshot.by_device == {"cpu": peak.nbytes}
    assert meter.timeline[9][0] == peak.index
    largest = peak.snapshot.largest(3)
    assert [each.nbytes for each in largest] == [A, A, A]
    assert {each.birth.shape for each in largest} == {(T, F)}


def test_kinds_of_what_is_alive_after_a_step():
    model, x = two_layers(), torch.randn(T, H)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with MemoryMeter(model, optimizer, exclude=x) as meter:
        loss = model(x).sum()
        loss.backward()
        after = meter.mark("backward", outputs=loss)
        optimizer.step()
        mark = meter.mark("step")
    assert after.by_kind == {"parameter": 2 * W, "gradient": 2 * W, "other": 4}
    assert mark.by_kind == {**after.by_kind, "optimizer": 2 * W}
    assert mark.live == sum(mark.by_kind.values()) == mark.by_device["cpu"]
    assert mark.allocated == 6 * W + 512  # weights are multiples of 512 bytes, the loss is not
    assert [each.name for each in meter.marks] == ["backward", "step"]


def test_gradients_freed_before_the_end_are_known_as_such():
    model, x = two_layers(), torch.randn(T, H)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryMeter(model, optimizer, x) as meter:
        train_step(model, optimizer, x)
    assert meter.peak.snapshot.by_kind["gradient"] == W


def test_leaks_are_empty_after_backward_and_find_what_is_kept():
    model, x = two_layers(), torch.randn(T, H, requires_grad=True)
    with MemoryMeter(model, exclude=x) as meter:
        loss = model(x).sum()
        loss.backward()
        assert meter.leaks(expected=loss) == ()
    assert meter.leaks(expected=[{"loss": loss}]) == ()
    kept = []
    model[1].register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    with MemoryMeter(model, exclude=x) as meter:
        loss = model(x).sum()
        loss.backward()
        (leak,) = meter.leaks(expected=loss)
    assert (leak.nbytes, leak.birth.op, leak.birth.module) == (
        A,
        "aten.relu.default",
        "Sequential.1",
    )
    kept.clear()
    assert meter.leaks(expected=loss) == ()


def test_a_graph_that_is_kept_is_a_leak():
    model, x = two_layers(), torch.randn(T, H)
    losses = []
    with MemoryMeter(model, exclude=x) as meter:
        for _ in range(3):
            losses.append(model(x).sum())  # as of a user who sums losses, not their values
        assert meter.saved == 3 * (A + 4)
        assert sum(each.nbytes for each in meter.leaks(losses)) == 3 * A


def test_micro_batches_in_flight_are_added_up():
    model, x = two_layers(), torch.randn(T, H)
    with MemoryMeter(exclude=model) as meter:
        for _ in range(3):
            model(x).sum().backward()
        assert (meter.saved_peak, meter.saved_total) == (A + 4, 3 * (A + 4))
    with MemoryMeter(exclude=model) as meter:
        losses = [model(x).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
    assert (meter.saved_peak, meter.saved_total) == (2 * (A + 4), 2 * (A + 4))


def test_a_backward_that_follows_other_work_is_judged():
    """A logger may run without gradients before it, and a first gradient (here kept) be given."""
    x = torch.randn(T, H, requires_grad=True)
    with MemoryMeter() as meter:
        y = (x * 1).exp()
        grad = torch.ones(T, H)
        with torch.no_grad():
            y.sum()
        y.backward(grad)
        assert (meter.saved_peak, meter.saved_total) == (2 * X, 2 * X)


def test_nested_meters_agree_and_the_same_meter_is_refused():
    with MemoryMeter() as outer:
        a = torch.zeros(10)
        with MemoryMeter() as inner:
            b = torch.zeros(20)
            assert (outer.live, inner.live) == (120, 80)
        del a, b
        assert outer.live == 0
        with pytest.raises(RuntimeError, match="on already"):
            outer.__enter__()
    with outer:
        assert outer.live == 0
        assert outer.timeline == [(-1, 0.0, 0)]


def test_only_every_third_entry_is_measured():
    meter = MemoryMeter(sample_every=3)
    peaks = []
    for size in range(1, 8):
        with meter:
            torch.zeros(size)
            assert meter.is_on == (size % 3 == 1)
            with pytest.raises(RuntimeError, match="on already"):
                meter.__enter__()
        peaks.append(meter.peak.nbytes // 4)
    assert peaks == [1, 1, 1, 4, 4, 4, 7]


def test_after_the_context_nothing_is_followed_but_all_is_readable():
    goes_on = Mutation(
        "storages call back after the end",
        "ms_profile.memory.meter:MemoryMeter.closed",
        "self._census.stop()",
        "pass",
    )
    assert_caught(goes_on, check_after_the_context)


def check_after_the_context():
    calls = []
    with MemoryMeter() as meter:
        a = torch.zeros(10)
    meter._census.before_change = calls.append
    torch.zeros(100)
    assert meter.live == 40
    assert meter.peak.nbytes == 40
    storage = weakref.ref(a.untyped_storage())
    assert meter.snapshot().nbytes == 40
    del a
    assert storage() is None
    assert calls == []
    assert meter.live == 0


def test_a_dropped_meter_is_freed():
    with MemoryMeter() as meter:
        a = torch.zeros(10)
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    assert a.numel() == 10


def test_an_exception_leaves_the_meter_closed():
    meter = MemoryMeter()

    def fail():
        with meter:
            torch.zeros(10)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not meter.is_on
    assert meter.peak.nbytes == 40


def test_the_timeline_keeps_its_highest_point_in_little_room():
    with MemoryMeter(points=8) as meter:
        kept = []
        for i in range(40):
            kept.append(torch.zeros(25))
            if i == 29:
                kept = kept[:1]
        del kept
    points = meter.timeline
    assert len(points) <= 8
    assert max(live for _, _, live in points) == meter.peak.nbytes == 3000
    assert [index for index, _, _ in points] == sorted(index for index, _, _ in points)


def test_as_dict_is_json_with_the_agreed_keys():
    model, x = two_layers(), torch.randn(T, H)
    with MemoryMeter(model) as meter:
        loss = model(x).sum()
        meter.mark("forward", outputs=loss)
        loss.backward()
    found = json.loads(json.dumps(meter.as_dict()))
    assert (found["kind"], found["version"]) == ("memory", 1)
    assert found["peak"]["bytes"] == meter.peak.nbytes
    assert found["peak"]["module"] == "Sequential.1"
    assert found["saved"] == {"total": A, "peak": A}
    assert found["timeline"] == [list(point) for point in meter.timeline]
    assert found["marks"][0]["name"] == "forward"
    by_module = found["by_module"]
    assert by_module["Sequential.1"]["saved"] == A
    assert sum(each["at_peak"] for each in by_module.values()) == meter.peak.nbytes
    assert sum(each["saved"] for each in by_module.values()) == A
    assert max(each["highest"] for each in by_module.values()) == meter.peak.nbytes


def test_what_it_cannot_follow_is_refused():
    with pytest.raises(TypeError, match=r"got list.*one by one"):
        MemoryMeter([torch.zeros(1)])
    with pytest.raises(TypeError, match="got int"):
        MemoryMeter(exclude=[3])
    with pytest.raises(ValueError, match="at least 2"):
        MemoryMeter(points=1)
    with pytest.raises(ValueError, match="sample_every: got 0"):
        MemoryMeter(sample_every=0)
