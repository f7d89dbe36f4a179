"""Features on whole models: bytes by formula, gradients bit for bit, what is refused."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ms_memory import Session
from ms_memory.errors import MemoryFeatureError
from ms_memory.recompute import activation, norms
from ms_ops import rms_norm, swiglu
from support.gpt import gpt, tokens
from support.gradients import GATED, MATRIX, PLAIN, all_equal, check, run
from support.mutation import Mutation, assert_caught

TOKENS = 10


def both(session):
    activation(session)
    norms(session)


@contextlib.contextmanager
def everything(model):
    with Session(model) as session:
        both(session)
        yield


@pytest.mark.parametrize("name", MATRIX)
def test_grad_bitequal(name):
    check(name, everything)


def test_frozen():
    found = []
    for session in (False, True):
        model = gpt(PLAIN)
        for name, p in model.named_parameters():
            p.requires_grad_("fc1" not in name and "ln1" not in name and "embed" not in name)
        if session:
            both(Session(model))
        found.append(run(model, PLAIN))
    assert all_equal(*found)


def test_exception_in_forward():
    model = gpt(PLAIN)
    session = Session(model)
    both(session)
    fc2 = model.layers[1].mlp.fc2

    def broken(module, args):
        raise RuntimeError("broken")

    for module in (fc2, model.layers[1].attn):
        handle = module.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            model(tokens(PLAIN))
        handle.remove()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert all_equal(run(model, PLAIN), run(gpt(PLAIN), PLAIN))


def saved(model, shape, apply=None):
    """Bytes alive after a forward, by module where they were saved."""
    with Session(model) as session:
        ledger = session.ledger
        if apply is not None:
            apply(session)
        out = model(tokens(shape))
        kept = {}
        for entry in ledger.entries:
            name = entry.site.module
            kept[name] = kept.get(name, 0) + entry.live_bytes
        del out
    return kept


def freed(make, shape, apply):
    """Bytes that a feature frees in every layer, and the modules that keep less."""
    before, after = saved(make(shape), shape), saved(make(shape), shape, apply)
    bytes_, rest = divmod(sum(before.values()) - sum(after.values()), shape.layers)
    assert not rest
    return bytes_, {name for name in before if before[name] != after.get(name, 0)}


def test_bytes_gelu():
    found, where = freed(gpt, PLAIN, activation)
    assert found == 4 * TOKENS * PLAIN.hidden
    assert all("mlp" in name for name in where)


def test_bytes_swiglu_eager():
    """The activated gate and its product with the other half."""
    found, where = freed(gpt, GATED, activation)
    assert found == 2 * 4 * TOKENS * GATED.hidden
    assert all("mlp" in name for name in where)


class Swiglu(nn.Module):
    def forward(self, x):
        return swiglu(x)


def fused(shape):
    model = gpt(shape)
    for layer in model.layers:
        layer.mlp.fc1, layer.mlp.act = nn.Linear(shape.width, 2 * shape.hidden), Swiglu()
    return model


def test_bytes_swiglu_fused():
    found, _ = freed(fused, PLAIN, lambda session: activation(session, "*.mlp.act"))
    assert found == 4 * TOKENS * PLAIN.hidden


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.weight)


def test_bytes_layernorm():
    """The output and, in fp32 on the CPU, mean and reciprocal deviation, 4 bytes each a token."""
    found, _ = freed(gpt, PLAIN, norms)
    assert found == 2 * 4 * TOKENS * (PLAIN.width + 2)


def test_bytes_rmsnorm():
    """The output and the reciprocal root mean square."""
    found, _ = freed(gpt, replace(PLAIN, norm=RMSNorm), norms)
    assert found == 2 * 4 * TOKENS * (PLAIN.width + 1)


def test_parallel_residual():
    """One norm read by two siblings: it comes back for whichever is differentiated first."""
    shape = replace(PLAIN, parallel=True)
    before, after = saved(gpt(shape), shape), saved(gpt(shape), shape, norms)
    freed = sum(before.values()) - sum(after.values())
    assert freed == shape.layers * 4 * TOKENS * (shape.width + 2)


def test_identity_norm_skipped():
    shape = replace(PLAIN, parallel=True)
    with Session(gpt(shape)) as session:
        assert norms(session) == [f"layers.{i}.ln1" for i in range(shape.layers)]
    with Session(gpt(shape)) as session, pytest.raises(MemoryFeatureError, match="E-M22"):
        norms(session, match="*.ln2")


def test_layers():
    cases = ((None, [0, 1, 2]), (2, [0, 1]), (slice(1, None), [1, 2]), (lambda i: i % 2, [1]))
    for layers, expected in cases:
        with Session(gpt(PLAIN)) as session:
            assert activation(session, layers=layers) == [f"layers.{i}.mlp.act" for i in expected]
            found = norms(session, layers=layers)
            assert found == [f"layers.{i}.ln{k}" for i in expected for k in (1, 2)]
    with Session(gpt(PLAIN)) as session:
        assert activation(session, layers=0) == []
        with pytest.raises(ValueError, match="layers"):
            norms(session, layers=4)
        with pytest.raises(MemoryFeatureError, match="E-M22"):
            norms(session, layers=lambda i: i > 5)


def test_named_consumer():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(4, 4)
            self.bend = nn.Hardswish()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.bend(self.first(x)))

    x = torch.randn(3, 4)
    expected = Odd()
    model = copy.deepcopy(expected)
    expected(x).sum().backward()
    with Session(model) as session:
        with pytest.raises(MemoryFeatureError, match=r"E-M22.*match="):
            activation(session)
        with pytest.raises(MemoryFeatureError, match=r"E-M22.*bend"):
            activation(session, match="bund")
        with pytest.raises(MemoryFeatureError, match="beside"):
            activation(session, match="bend", consumer="*")
        assert activation(session, match="bend", consumer="second") == ["bend"]
        model(x).sum().backward()
    assert all_equal([p.grad for p in expected.parameters()], [p.grad for p in model.parameters()])
    model = Odd()
    with Session(model) as session:
        activation(session, match="bend", consumer="first")
        model(x)  # the reader runs before: nothing waits then
        session.close()
    model = nn.ModuleDict({"act": nn.GELU(), "fc": nn.Linear(4, 4)})
    model.forward = lambda x: model["fc"](model["act"](x) * 2)
    with Session(model) as session:
        activation(session)
        with pytest.raises(MemoryFeatureError, match="does not read"):
            model(x)


def test_gated_by_formula_not_by_name():
    """A module with the right names and another forward is left alone."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("w1", "w3", "w2"):
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x)) * 2

    class Right(Other):
        def forward(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    with Session(Other()) as session, pytest.raises(MemoryFeatureError, match="E-M22"):
        activation(session)
    model = nn.ModuleList([Right()])
    state = torch.get_rng_state()
    with Session(model) as session:
        assert activation(session) == ["0"]
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_inline():
    """An operator that saves a discarded norm and is differentiated first gets it back."""

    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.norm(x)
            return x + self.fc(y) * y

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.layers = nn.ModuleList(Inline() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    x = torch.randn(3, 4)
    plain, model = Stack(), Stack()
    plain(x).sum().backward()
    with Session(model) as session:
        norms(session)
        model(x).sum().backward()
    assert all_equal([p.grad for p in plain.parameters()], [p.grad for p in model.parameters()])


def test_norm_that_its_layer_returns_is_kept():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x + self.fc(x))

    model = nn.Module()
    model.layers = nn.ModuleList([Post()])
    model.forward = lambda x: model.layers[0](x)
    with Session(model) as session:
        norms(session)
        out = model(torch.randn(3, 4))
        assert out.untyped_storage().nbytes() == 48
        out.sum().backward()


def test_what_a_module_already_does():
    model = gpt(PLAIN)
    with Session(model) as session:
        activation(session)
        with pytest.raises(MemoryFeatureError, match=r"E-M10.*layers\.0\.mlp\.act"):
            activation(session)
        text = str(session.report())
        assert "layers.2.mlp.act  recompute.activation  until layers.2.mlp.fc2" in text


MUTATIONS = {
    "a discarded norm is not asked back by the chain": (
        "ms_memory.chain:Chain._fetch", "holder.owner.fill()",
        "kept.untyped_storage().resize_(holder.nbytes).fill_(0)",
    ),
    "the gate is left out": (
        "ms_memory.recompute.activation:Gated.product", "self.act(gate) * up", "self.act(gate)",
    ),
}  # fmt: skip


def check_all():
    check("parallel_residual", everything)
    check("gated", everything)
    test_saved_inline()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name):
    by = AssertionError, MemoryFeatureError
    assert_caught(Mutation(name, *MUTATIONS[name]), check_all, by)
