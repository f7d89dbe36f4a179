"""Real devices by name, the processor's refusal, and the calls an accelerator gets."""

import contextlib

import pytest
import torch

from ms_memory import device


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
