"""Real devices by name, the processor's refusal, and the calls an accelerator gets."""

import contextlib

import pytest
import torch
from torch import nn

from ms_memory import Session, Streamed, device
from ms_memory.device.probe import LARGE, SMALL, Rate, line, probe


class Module:
    """A torch device module that writes down what it is asked."""

    def __init__(self):
        self.log = []

    def Stream(self):
        return Side(self, "side")

    def current_stream(self):
        return Side(self, "current")

    @contextlib.contextmanager
    def stream(self, side):
        self.log.append(f"on {side.name}")
        yield

    def Event(self):
        return Mark(self)

    def memory_allocated(self):
        return 3

    def max_memory_allocated(self):
        return 7


class Side:
    def __init__(self, module, name):
        self.module, self.name = module, name

    def wait_event(self, event):
        self.module.log.append(f"{self.name} waits for {event.where}")


class Mark:
    def __init__(self, module):
        self.module, self.where = module, None

    def record(self, stream):
        self.where = stream.name

    def query(self):
        return self.where is not None

    def synchronize(self):
        self.module.log.append(f"program waits for {self.where}")


def test_accelerator_orders_streams():
    module = Module()
    accelerator = device.Accelerator("cuda", module)
    host, x = torch.zeros(3), torch.ones(3)
    accelerator.d2h.wait(accelerator.record())
    event = accelerator.d2h.copy([(host, x)])
    event.wait()
    event.synchronize()
    assert module.log == [
        "side waits for current",
        "on side",
        "current waits for side",
        "program waits for side",
    ]
    assert event.done()
    assert host.tolist() == [1, 1, 1]
    assert accelerator.stats() == device.DeviceStats(3, 7, 0)
    assert accelerator.d2h is accelerator.d2h
    assert not accelerator.owns(x)


def test_resolve():
    assert device.resolve("cpu").name == "cpu"
    sim = device.sim()
    assert device.resolve(sim) is sim
    assert device.resolve(torch.device("cuda", 0)).name == "cuda"
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert device.resolve().name == (kind.type if kind else "cpu")
    with pytest.raises(ValueError, match="need one that torch has a module for"):
        device.resolve("npu" if not hasattr(torch, "npu") else "hpu")


@pytest.mark.parametrize(
    ("given", "schedule", "capacity"),
    [
        ("early", "early", None),
        ("late", "late", None),
        ("17", 17, None),
        ("late:4096", "late", 4096),
    ],
)
def test_a_simulated_device_from_the_environment(monkeypatch, given, schedule, capacity):
    monkeypatch.setenv("MS_MEMORY_SIM", given)
    model = nn.Linear(2, 2)
    found = Session(model).device
    assert (found.name, found.schedule, found.capacity) == ("sim", schedule, capacity)
    # Who names a device gets it.
    assert device.resolve("cpu").name == device.resolve(torch.device("cpu")).name == "cpu"
    assert device.device_of(torch.device("cuda", 0)).name == "cuda"
    assert Streamed(torch.optim.SGD(model.parameters(), 0.1)).step() is None
    monkeypatch.delenv("MS_MEMORY_SIM")
    with pytest.raises(RuntimeError, match="MS_MEMORY_SIM=late"):
        Streamed(torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("given", ["soon", "late:", "late:1GiB", "-1", ":5", "3:4:5"])
def test_an_unreadable_simulated_device(monkeypatch, given):
    monkeypatch.setenv("MS_MEMORY_SIM", given)
    with pytest.raises(ValueError, match=f"MS_MEMORY_SIM: got '{given}', need early, late or a"):
        device.device_of(torch.device("cpu"))


def test_the_processor_refuses_to_copy():
    cpu = device.cpu()
    for act in (lambda: cpu.d2h, lambda: cpu.h2d, cpu.record, lambda: cpu.pinned(4)):
        with pytest.raises(RuntimeError, match="frees nothing here"):
            act()
    x = cpu.empty_like(torch.ones(3))
    cpu.empty_storage(x)
    assert x.untyped_storage().nbytes() == 0
    cpu.restore_storage(x, 12)
    assert cpu.owns(x.fill_(1))
    assert cpu.stats().allocated == 0


def test_probe():
    """A latency and a rate from two sizes; a virtual clock says them exactly."""
    clock = device.VirtualClock(2 * 10**9, 10**9, latency_ns=7)
    rates = probe(device.sim(clock=clock))
    assert rates.out.time([3, 4]) == 7 + 2 + 7 + 2
    assert rates.back.time([1000]) == clock.duration("h2d", 1000) == 1007
    assert probe(device.sim()).out.time([1 << 40]) == 0
    rate = line(10_000 + 2 * SMALL, 10_000 + 2 * LARGE)
    assert (rate.latency_ns, rate.bytes_per_s) == (10_000, 500_000_000)
    assert line(5, 5).bytes_per_s == LARGE * 10**9 // 5
    with pytest.raises(RuntimeError, match="frees nothing"):
        probe(device.cpu())


class Other:
    """A device that is not known to be simulated."""

    def __init__(self):
        self.sim = device.sim()

    def __getattr__(self, name):
        return getattr(self.sim, name)


def test_probe_times_copies(monkeypatch):
    """Each size five times in each direction, after what was computed before."""
    copies, ticks = [], iter(range(0, 10**6, 250))
    monkeypatch.setattr("ms_memory.device.probe.LARGE", SMALL + 1000)
    other = Other()
    for stream in (other.d2h, other.h2d):
        original = stream.copy
        stream.copy = lambda pairs, copy=original: copies.append(pairs[0][1].numel()) or copy(pairs)
    rates = probe(other, clock=ticks.__next__)
    assert copies == [SMALL] * 10 + [SMALL + 1000] * 10
    # Every copy took 250 ns by this clock: no latency, the rate of the large one.
    assert rates.out == rates.back == Rate(0, (SMALL + 1000) * 10**9 // 250)
