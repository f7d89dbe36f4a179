"""MemoryMeter against what else counts memory: torch's MemTracker and the allocator's events."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from ms_profile.memory import (
    MemoryMeter,
    peak_bytes,
    peak_resident_bytes,
    reserved_bytes,
    reset_peak_bytes,
)

H, FFN, HEADS = 64, 128, 4


class Layer(nn.Module):
    """Attention and a gated MLP with their norms; x: [B, S, H]."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, H)
        self.up, self.down = nn.Linear(H, 2 * FFN), nn.Linear(FFN, H)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def mlp():
    return nn.Sequential(nn.Linear(H, FFN), nn.GELU(), nn.Linear(FFN, H))


class Training:
    """A model with its optimizer, after a first step, so that all states exist."""

    def __init__(self, make, tokens, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = make().to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x = torch.randn(2, tokens, H, dtype=dtype)
        self.step()

    def step(self):
        loss = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def meter(self):
        return MemoryMeter(self.model, self.optimizer, self.x)


def allocated_peak(run):
    """Highest running sum of the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("tokens", [8, 256], ids=["peak in optimizer", "peak in backward"])
@pytest.mark.parametrize("make", [mlp, Layer])
def test_torchs_tracker_agrees_on_the_peak(make, tokens):
    """Total, parameters, gradients and inputs agree at the peak. Where the tracker differs:

    - it counts all that an optimizer step makes as its states, temporaries included;
    - it counts outputs, the loss too, as activations, and what backward makes as temporaries;
    - on CUDA it rounds to 512 bytes (ours are exact; rounded ones are apart).
    """
    training = Training(make, tokens)
    tracker = MemTracker()
    tracker.track_external(training.model, training.optimizer, training.x)
    with tracker:
        training.step()
    with training.meter() as meter:
        training.step()
    theirs = {
        getattr(kind, "value", kind): nbytes
        for kind, nbytes in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()
    }
    peak = meter.peak
    ours = peak.snapshot.by_kind
    assert peak.nbytes == theirs["Total"]
    assert ours["parameter"] == theirs["Parameter"]
    assert ours["input"] == theirs["Other"]
    if peak.phase == "other":
        assert tokens == 8
        assert ours["gradient"] == theirs["Gradient"]
        assert ours["optimizer"] + ours["other"] == theirs["Optstate"]
        assert ours["activation"] == theirs["Activation"] == 4  # the loss
    else:
        assert tokens == 256
        assert ours["optimizer"] == theirs["Optstate"]
        # Memory of the gradients that are not yet in place is the tracker's temporary.
        made = ours["activation"] + ours["other"] + ours.get("gradient", 0)
        assert made == theirs["Activation"] + theirs["Temp"] + theirs["Gradient"]


@pytest.mark.parametrize(
    ("tokens", "numbers"), [(8, 16), (128, 0)], ids=["peak in optimizer", "peak in backward"]
)
@pytest.mark.parametrize("make", [mlp, Layer])
def test_the_allocator_agrees_on_the_peak(make, tokens, numbers):
    """In fp32 to the byte: no operator that runs at the peak has a workspace of its own.

    `numbers` bounds the Python numbers that an optimizer's operators wrap in tensors of 8 bytes.
    """
    training = Training(make, tokens)
    plain = allocated_peak(training.step)
    meter = MemoryMeter()  # nothing given: as the profiler, it knows only what is made

    def metered():
        with meter:
            training.step()

    assert 0 <= allocated_peak(metered) - plain <= numbers  # the meter takes no tensor memory
    assert 0 <= plain - meter.peak.nbytes <= numbers


def without_workspaces(run, path):
    """Highest running sum without what is allocated and freed within one operator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "cpu_op"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    born, workspaces = {}, set()
    for place, event in enumerate(memory):
        address = event["args"]["Addr"]
        if event["args"]["Bytes"] > 0:
            born[address] = place
        elif address in born:
            start = memory[born[address]]["ts"]
            inner = [span for span in spans if span[0] <= start <= span[1]]
            if inner and event["ts"] <= max(inner)[1]:
                workspaces |= {born[address], place}
    kept = (e["args"]["Bytes"] for n, e in enumerate(memory) if n not in workspaces)
    return max(itertools.accumulate(kept))


@pytest.mark.parametrize("make", [mlp, Layer])
def test_workspaces_of_kernels_are_seen_by_the_allocator_alone(make, tmp_path):
    """In bf16 CPU kernels convert and reorder inside an operator; all else is equal to the byte."""
    training = Training(make, 128, torch.bfloat16)
    with MemoryMeter() as meter:
        training.step()
    assert without_workspaces(training.step, tmp_path / "trace.json") == meter.peak.nbytes
    assert allocated_peak(training.step) > meter.peak.nbytes


def test_peak_of_the_process_does_not_fall():
    before = peak_resident_bytes()
    block = bytearray(1 << 25)
    block[::4096] = bytes(len(block[::4096])).replace(b"\0", b"\1")
    assert peak_bytes("cpu") == peak_resident_bytes() >= before
    assert peak_resident_bytes() > 1 << 25
    assert reset_peak_bytes("cpu") is False


@pytest.mark.parametrize("ask", [peak_bytes, reserved_bytes, reset_peak_bytes])
def test_a_device_without_the_number_says_so(ask):
    with pytest.raises(ValueError, match="meta keeps no such number"):
        ask("meta")
    with pytest.raises(ValueError, match=r"torch\.cpu has no max_memory_reserved"):
        reserved_bytes("cpu")


class _Runtime:
    """Stands for torch.cuda or torch.npu."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda device: self.asked.append((name, str(device))) or 7


def test_an_accelerators_own_figures_are_asked_for(monkeypatch):
    runtime = _Runtime()
    monkeypatch.setattr(torch, "cuda", runtime)
    assert (peak_bytes("cuda:1"), reserved_bytes("cuda:1")) == (7, 7)
    assert reset_peak_bytes("cuda:1") is True
    assert runtime.asked == [
        ("max_memory_allocated", "cuda:1"),
        ("max_memory_reserved", "cuda:1"),
        ("reset_peak_memory_stats", "cuda:1"),
    ]
