"""Bytes as integers: saved, living, on the host, over time."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_memory.chain import Chain, chain_of, probed_hooks, top_hooks
from ms_memory.errors import MemoryFeatureError
from ms_memory.ledger import HostLedger, SavedLedger, StorageCensus, Timeline
from ms_memory.recompute import Discard
from ms_ops import rms_norm, swiglu

S, B, H, FFN = 6, 2, 8, 20
TOKENS = S * B


def linear(i, o):
    return nn.Linear(i, o, bias=False, dtype=torch.bfloat16)


class GeluMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = linear(H, FFN), linear(FFN, H)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class SwigluMLP(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.gate_up, self.down = linear(H, 2 * FFN), linear(FFN, H)
        self.gate, self.up = linear(H, FFN), linear(H, FFN)

    def forward(self, x):
        if self.fused:
            return self.down(swiglu(self.gate_up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H, dtype=torch.bfloat16))

    def forward(self, x):
        return rms_norm(x, self.weight)


# bytes by the ledger: w = 2, statistics of a norm in w bytes on the CPU, w_stat for rms_norm 4
CASES = {
    "gelu": (GeluMLP, 2 * TOKENS * (H + 2 * FFN)),
    "swiglu_eager": (lambda: SwigluMLP(False), 2 * TOKENS * (H + 4 * FFN)),
    "swiglu_fused": (lambda: SwigluMLP(True), 2 * TOKENS * (H + 3 * FFN)),
    "layernorm": (lambda: nn.LayerNorm(H, dtype=torch.bfloat16), 2 * TOKENS * (H + 2)),
    "rmsnorm": (Rms, TOKENS * (2 * H + 4)),
}


def sample(grad=True):
    torch.manual_seed(0)
    return torch.randn(S, B, H, dtype=torch.bfloat16).requires_grad_(grad)


@pytest.mark.parametrize("name", CASES)
def test_formulas(name):
    make, expected = CASES[name]
    model, x = make(), sample()
    with SavedLedger(exclude=model) as ledger:
        out = model(x)
    assert (ledger.nbytes, ledger.live_bytes) == (expected, expected)
    out.sum().backward()
    assert (ledger.nbytes, ledger.live_bytes) == (expected, 0)


@pytest.mark.parametrize("name", CASES)
def test_census_agrees(name):
    make, expected = CASES[name]
    model, x = make(), sample()
    with StorageCensus(track=[x]) as census:
        out = model(x)
        own = out.untyped_storage().nbytes()
        assert census.mark("forward") == expected + own
        assert census.peak >= census.nbytes
        del out
        assert census.mark("end") == x.untyped_storage().nbytes()
    assert census.marks == {"forward": expected + own, "end": x.untyped_storage().nbytes()}


def test_views_count_once():
    x = sample()
    with SavedLedger() as ledger:
        y = x * 2
        out = (
            (y[:2] ** 2).sum()
            + (y.view(-1) ** 3).sum()
            + (y.t() if y.dim() == 2 else y).exp().sum()
        )
    assert len({e.site for e in ledger.entries}) == 1  # no session: no sites
    assert ledger.nbytes == 2 * x.untyped_storage().nbytes()  # y, and what exp returned
    out.backward()
    assert x.grad is not None
    assert ledger.by_module() == {"": ledger.nbytes}
    ledger.clear()
    assert ledger.nbytes == 0


def test_what_hooks_do_not_see():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x * 2
            return x + 1

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.kept

    x = sample()
    with StorageCensus() as census, SavedLedger() as ledger:
        out = Keeps.apply(x)
        assert ledger.nbytes == 0
        assert census.mark("forward") == 2 * out.untyped_storage().nbytes()
        out = Discard()(torch.exp, x)
    assert ledger.nbytes == x.untyped_storage().nbytes()


def test_hooks_leave_values_and_identity():
    """Odd tensors pass: conjugates, sparse, empty, slices, other dtypes of the same bytes."""
    chain = Chain()
    z = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    x = torch.randn(4, 6, requires_grad=True)

    def loss():
        a = (z.conj() * z).real.sum() + (z.conj().imag * z.real).sum()
        b = (x[1:, ::2] * x[:3, 1::2]).sum() + (x[:0] ** 2).sum()
        bits = (x.detach().view(torch.int32) & 1).bool()
        dense = torch.eye(4).to_sparse() @ x
        return a + b + dense.pow(2).sum() + torch.where(bits, x.exp(), x.sin()).sum()

    expected = torch.autograd.grad(loss(), (z, x))
    with chain.hooks():
        value = loss()
    found = torch.autograd.grad(value, (z, x))
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    del value
    gc.collect()
    assert all(holder() is None for _, holder in chain._holders.values())


def test_a_saved_tensor_that_is_written_is_noticed():
    """With hooks torch itself looks no more."""
    x = torch.ones(3, requires_grad=True)

    def written(x, twice=False):
        y = x * 2
        z = y.pow(2).sum()
        y.add_(1)
        return z + y.pow(3).sum() if twice else z

    with Chain().hooks():
        z = written(x)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        z.backward()
    z = Discard()(written, x, twice=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        z.backward()


def test_whose_hooks_are_innermost():
    """As torch tells, and as it is found out where torch does not."""
    chain, other = Chain(), Chain()
    ledger = SavedLedger()
    chain.watch(ledger)
    foreign = torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda p: p[0])
    for ask in (top_hooks, probed_hooks):
        assert ask() is None
        with chain.hooks():
            assert chain_of(ask()) is chain
            with foreign:
                assert ask() is not None
                assert chain_of(ask()) is None
                with other.hooks():
                    assert chain_of(ask()) is other
            assert chain_of(ask()) is chain
        assert ask() is None
    assert ledger.entries == []


def test_stages_act_in_order():
    log = []

    class Half:
        def encode(self, holder, tensor):
            log.append(("encode", holder.nbytes))
            return tensor.to(torch.bfloat16)

        def decode(self, holder, tensor):
            log.append(("decode", tensor.dtype))
            return tensor.to(torch.float32)

    class Host:
        def save(self, holder, tensor):
            log.append(("save", tensor.dtype))
            holder.state[self] = tensor.clone()
            holder.tensor = None

        def load(self, holder):
            log.append(("load", holder.site.index))
            return holder.state.get(self)

    chain = Chain()
    remove = [chain.code(Half()), chain.place(Host())]
    x = torch.arange(4.0, requires_grad=True)
    with chain.hooks():
        out = (x * 2).pow(2).sum()
    out.backward()
    assert torch.equal(x.grad, 8 * torch.arange(4.0))  # exact in bf16
    assert [name for name, _ in log] == ["encode", "save", "load", "decode"]
    assert (log[0][1], log[1][1]) == (16, torch.bfloat16)
    for each in remove:
        each()
    assert (chain.codecs, chain.placements) == ([], [])


def test_excluded_and_fixed():
    moved = []

    class Stage:
        def save(self, holder, tensor):
            moved.append(holder.nbytes)

        def load(self, holder):
            return None

    chain = Chain()
    ledger = SavedLedger()
    chain.place(Stage())
    chain.watch(ledger)
    x, w = (torch.randn(3, requires_grad=True) for _ in range(2))
    chain.exclude([w])
    chain.fix([x])
    with chain.hooks():
        out = (x * w).exp().sum()
    out.backward()
    assert [(e.nbytes, e.fixed) for e in ledger.entries] == [(12, True), (12, False)]
    assert moved == [12]


def test_host_ledger():
    ledger = HostLedger(limit=100)
    ledger.take(60)
    with pytest.raises(MemoryFeatureError, match="E-M32"):
        ledger.take(41)
    ledger.give(60)
    ledger.take(100)
    assert (ledger.nbytes, ledger.peak, ledger.total) == (100, 100, 160)
    with pytest.raises(ValueError, match="limit"):
        HostLedger(-1)
    with pytest.raises(AssertionError):
        HostLedger().give(1)


def test_timeline():
    line = Timeline(base=10)
    assert (line.peak.name, line.peak.nbytes) == ("base", 10)
    line.alloc("a", 5)
    line.alloc("b", 7, "second")
    line.free("a")
    line.alloc("a", 5, "again")
    assert (line.peak.name, line.peak.nbytes, line.nbytes) == ("second", 22, 22)
    assert [e.nbytes for e in line.events] == [15, 22, 17, 22]
    assert line.alive() == {"b": 7, "a": 5}
    with pytest.raises(ValueError, match="twice"):
        line.alloc("a", 1)
    with pytest.raises(ValueError, match="alive"):
        line.free("c")
