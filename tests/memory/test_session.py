"""A session: one owner, one chain, everything put back."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from ms_memory import Session
from ms_memory.errors import MemoryFeatureError
from ms_memory.recompute import activation, norms
from support.gpt import GPT, Shape, gpt, tokens

SHAPE = Shape(layers=2)


def surface(model):
    """All of a model that a session may touch."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "forward_hooks_with_kwargs")
    hooks = [f"_{kind}" for kind in (*kinds, "forward_hooks_always_called")]
    return {
        name: (sorted(m.__dict__), [dict(getattr(m, h)) for h in hooks])
        for name, m in model.named_modules()
    }


def test_close_restores():
    model = gpt(SHAPE)
    before = surface(model)
    with Session(model) as session:
        assert session.ledger.entries == []
        activation(session)
        norms(session)
        model(tokens(SHAPE)).sum().backward()
        assert surface(model) != before
    assert surface(model) == before
    assert model.forward.__func__ is GPT.forward
    session.close()


def test_a_forward_that_was_replaced_before_comes_back():
    model = nn.Linear(2, 2)
    mine = lambda x: x + 1  # noqa: E731
    model.forward = mine
    with Session(model):
        assert torch.equal(model(torch.ones(2)), torch.full((2,), 2.0))
    assert model.forward is mine


def test_second_owner():
    model = gpt(SHAPE)
    session = Session(model)
    for other in (model, model.layers[1], nn.Sequential(model)):
        with pytest.raises(MemoryFeatureError, match="E-M20"):
            Session(other)
    session.close()
    Session(model.layers[0]).close()
    Session(model).close()


def test_foreign_patch():
    model = gpt(SHAPE)
    session = Session(model)
    activation(session)
    act = model.layers[0].mlp.act
    ours = act.forward
    act.forward = lambda x: ours(x) * 2
    with pytest.raises(MemoryFeatureError, match=r"E-M21.*'layers\.0\.mlp\.act'"):
        session.close()
    session.close()
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(act(x), nn.functional.gelu(x) * 2)  # theirs stays, ours is off
    assert "forward" not in model.__dict__
    Session(model).close()


def test_copies_are_plain():
    model = gpt(SHAPE)
    with Session(model) as session:
        activation(session)
        twin = copy.deepcopy(model)
        assert twin.forward.__self__ is twin
        with torch.no_grad():
            twin.head.weight.zero_()
        assert twin(tokens(SHAPE)).abs().sum() == 0
        assert list(inspect.signature(model.forward).parameters) == ["tokens"]
        with pytest.raises(MemoryFeatureError, match="E-M20"):
            Session(model)
        Session(twin).close()


def test_sites():
    model = gpt(SHAPE)
    with Session(model) as session:
        ledger = session.ledger
        seen = []
        for _ in range(2):
            model(tokens(SHAPE)).sum().backward()
            seen.append([(e.site, e.nbytes) for e in ledger.entries])
        assert seen[0] == seen[1]
        sites = [site for site, _ in seen[0]]
        assert len(set(sites)) == len(sites)
        assert {"layers.0.mlp.fc1", "layers.1.attn", "head"} <= {s.module for s in sites}
        assert sites[0].index == 0
        assert session.chain.forward == 2
        with torch.no_grad():
            model(tokens(SHAPE))
        assert session.chain.forward == 2
        assert session.report().saved_bytes == ledger.nbytes > 0
        assert f"{ledger.nbytes} bytes" in str(session.report())


def test_a_module_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    model = Twice()
    with Session(model) as session:
        ledger = session.ledger
        model(torch.ones(2, 3, requires_grad=True) * 2)
        assert [(e.site.module, e.site.call) for e in ledger.entries] == [("fc", 0), ("", 0)]
        assert ledger.entries[0].fixed  # the model's input: not for moving


class Host:
    """A placement that keeps clones."""

    def __init__(self):
        self.moved = 0

    def save(self, holder, tensor):
        self.moved += 1
        holder.state[self] = tensor.clone()
        holder.tensor = None

    def load(self, holder):
        return holder.state.get(self)


def test_placement_and_features_together():
    """Discarded outputs stay with their owner, all else may be placed."""
    expected = gpt(SHAPE)
    expected(tokens(SHAPE)).sum().backward()
    model, stage = gpt(SHAPE), Host()
    with Session(model) as session:
        session.on_close(session.chain.place(stage))
        activation(session)
        norms(session)
        model(tokens(SHAPE)).sum().backward()
    assert stage.moved > 10
    for p, q in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_hooks_of_others():
    model, stage, seen = gpt(SHAPE), Host(), []
    theirs = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
    with Session(model, strict=True) as session:
        activation(session)
        with theirs:
            model(tokens(SHAPE)).sum().backward()
        session.chain.place(stage)
        with theirs, pytest.raises(MemoryFeatureError, match="E-M10"):
            model(tokens(SHAPE))
    with Session(model, strict=False) as session, theirs:
        session.chain.place(stage)
        model(tokens(SHAPE)).sum().backward()
    assert stage.moved == 0
    assert len(seen) > 20


def test_bad_arguments():
    with pytest.raises(ValueError, match="rng"):
        Session(nn.Linear(2, 2), rng=("gpu",))


def test_registered_generator():
    generator = torch.Generator()

    class Noise(nn.GELU):
        def forward(self, x):
            return super().forward(x) + torch.rand(x.shape, generator=generator)

    found = []
    for registered in (None, True):
        generator.manual_seed(4)
        model = gpt(SHAPE)
        for layer in model.layers:
            layer.mlp.act = Noise()
        if registered:
            session = Session(model)
            activation(session)
            session.register_rng(generator.get_state, generator.set_state)
        model(tokens(SHAPE)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_megatron_import():
    """Every module imports where Megatron and vendors' packages cannot be."""
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('megatron', 'torch_npu', 'matplotlib', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import ms_memory\n"
        "found = [m.name for m in pkgutil.walk_packages(ms_memory.__path__, 'ms_memory.')]\n"
        "assert len(found) > 40, found\n"
        "for name in found:\n"
        "    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
