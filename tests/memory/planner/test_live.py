"""A plan at work on a model: what it predicts is what is measured, and nothing else changes."""

import importlib
import itertools
import json
import logging
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from ms_memory import MemoryFeatureError, planner
from ms_memory.session import Session
from support.ranks import run_ranks

HIDDEN, VOCABULARY, LAYERS = 16, 32, 4


class Block(nn.Module):
    """A layer of a GPT: attention and MLP, with dropout; the MLP's width is a choice."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)

    def forward(self, x):
        b, n, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, 2, h // 2).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(a.transpose(1, 2).reshape(b, n, h)), 0.1)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block(width) for width in widths)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens):
        self.calls += 1
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make(widths=(64, 64, 160, 64)):
    torch.manual_seed(1)
    return GPT(widths), torch.randint(VOCABULARY, (2, 32))


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def ticks():
    """A clock that is the same in every run: each look is a microsecond later than the last."""
    return itertools.count(step=1000).__next__


@pytest.fixture(scope="module")
def profiled():
    model, tokens = make()
    found = planner.profile(model, lambda: loss_of(model, tokens), steps=1, clock=ticks())
    return model, tokens, found


def with_times(found):
    """Recomputing a layer costs 100 us, discarding its norms 7 us."""
    data = json.loads(json.dumps(found.as_dict()))
    for layer in data["layers"]:
        for option in layer["options"]:
            option["time"] = {"keep": 0, "recompute": 100_000, "norms": 7_000}[option["name"]]
    return planner.Profile.from_dict(data)


def test_profile_bytes(profiled):
    model, tokens, found = profiled
    assert [layer.name for layer in found.layers[1:-1]] == [f"blocks.{i}" for i in range(4)]
    options = [{o.name: o for o in layer.options} for layer in found.layers[1:-1]]
    assert set(options[0]) == {"keep", "norms", "recompute"}
    size = tokens.numel() * HIDDEN * 4
    # Two norm outputs a layer, and nothing of the interior when it is computed again.
    assert options[0]["keep"].held - options[0]["norms"].held == pytest.approx(2 * size, abs=1024)
    assert size <= options[0]["recompute"].held <= size + 6000  # beside it the state of dropout
    # A wider MLP: its two inner activations.
    wide = 2 * tokens.numel() * 96 * 4
    assert options[2]["keep"].held - options[1]["keep"].held == wide
    state = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert found.base == state
    assert found.step == state + sum(p.nbytes for p in model.parameters())


def test_profile_leaves_no_trace():
    model, tokens = make()
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    before = torch.get_rng_state()
    planner.profile(model, lambda: loss_of(model, tokens), steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.calls == 0
    assert model.head.weight.grad is kept
    assert model.embedding.weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_predicted_equals_measured_peak(profiled, share):
    model, tokens, found = profiled
    problem = with_times(found).problem()
    top = max(problem.live([0] * 6))
    low = planner.solve(problem, top, explain=False).minimum
    made = planner.solve(problem, low + int((top - low) * share), explain=False)
    assert made.proven
    with Session(model) as session:
        planner.apply(session, made)
        seen = planner.verify(model, lambda: loss_of(model, tokens), made)
    assert seen.predicted == seen.measured == made.peak <= made.budget


def test_a_forgotten_transient_shows(profiled):
    """A profile that leaves out what a recomputation needs in backward predicts a lower peak."""
    model, tokens, found = profiled
    data = with_times(found).as_dict()
    for layer in data["layers"][1:-1]:
        for option in layer["options"]:
            option["backward"] = option["held"]
    wrong = planner.Profile.from_dict(data).problem()
    names = [layer["name"] for layer in data["layers"][1:-1]]
    made = planner.solve(wrong, 10**7, pins=dict.fromkeys(names, "recompute"), explain=False)
    with Session(model) as session:
        planner.apply(session, made)
        seen = planner.verify(model, lambda: loss_of(model, tokens), made)
    assert seen.measured > seen.predicted


def gradients(model, tokens):
    model.zero_grad()
    torch.manual_seed(5)
    loss = loss_of(model, tokens)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_plan_end_to_end():
    model, tokens = make()
    want = gradients(model, tokens)
    model.zero_grad()
    budget = 300_000
    with planner.plan(model, lambda: loss_of(model, tokens), budget, clock=ticks()) as installed:
        assert installed.verified.measured == installed.verified.predicted <= budget
        assert max(installed.plan.unplanned) > budget
        assert "predicted peak" in str(installed)
        got = gradients(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all("forward" not in vars(m) for m in model.modules())
    again = gradients(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


def test_a_step_over_the_budget_is_planned_again_once(monkeypatch):
    """What is measured beyond the budget is taken off it; then the plan stays, and it is said."""
    model, tokens = make()
    step, seen = partial(loss_of, model, tokens), []

    def more(model, step, made):
        seen.append(made.budget)
        return planner.Verified(made.peak, 400_000 + 1234)

    monkeypatch.setattr(importlib.import_module("ms_memory.planner.apply"), "verify", more)
    with planner.plan(model, step, 400_000, clock=ticks()):
        assert seen == [400_000, 400_000 - 1234]
    assert not any("forward" in vars(m) for m in model.modules())


def test_times_of_like_layers_are_levelled():
    """One layer that was disturbed while it was timed does not look dearer than its like."""
    model, tokens = make((64, 64, 64, 64))
    found = planner.profile(model, partial(loss_of, model, tokens), steps=1)
    for name in ("norms", "recompute"):
        times = {o.time for layer in found.layers[1:-1] for o in layer.options if o.name == name}
        assert len(times) == 1


def test_guard_dynamic_shape(caplog):
    model, tokens = make()
    long = torch.cat([tokens, tokens], 1)
    want = gradients(model, long)
    step = partial(loss_of, model, tokens)
    with planner.plan(model, step, 10**7, clock=ticks()) as installed:
        gradients(model, tokens[:, :8])
        assert not installed.fallen_back
        with caplog.at_level(logging.WARNING, logger="ms_memory"):
            got = [gradients(model, long) for _ in range(2)]
        assert installed.fallen_back
        assert len(caplog.records) == 1
        assert {a.feature for a in installed.session.actions} == {"recompute.modules"}
        assert len(installed.session.actions) == LAYERS
    assert all(torch.equal(a, b) for run in got for a, b in zip(run, want, strict=True))
    strict = planner.plan(model, step, 10**7, strict=True, clock=ticks())
    with strict, pytest.raises(MemoryFeatureError, match="E-M23"):
        model(long)


def test_pins_and_what_is_refused(profiled):
    model, tokens, found = profiled
    step = partial(loss_of, model, tokens)
    made = planner.solve(found.problem(), 10**7, pins={"blocks.1": "recompute"})
    assert made.actions() == {"blocks.1": "recompute"}
    with pytest.raises(MemoryFeatureError, match="E-M30"):
        planner.plan(model, step, 1000, clock=ticks())
    with pytest.raises(MemoryFeatureError, match="E-M22"):
        planner.profile(model, step, layers=["blocks.9"])
    with pytest.raises(MemoryFeatureError, match=r"E-M22.*module list"):
        planner.profile(nn.Linear(2, 2), step)
    with pytest.raises(MemoryFeatureError, match=r"E-M22.*once"):
        planner.profile(model, lambda: loss_of(model, tokens) + loss_of(model, tokens))
    for part, action, error, say in (
        ("blocks.0", "swap", RuntimeError, "frees nothing"),
        ("blocks.0", "discard", ValueError, "'discard' of 'blocks.0', need"),
        ("blocks.0.mlp", "recompute", MemoryFeatureError, "E-M22"),
    ):
        option = planner.Option(action, (), 0, 0, ((part, action),))
        other = planner.Problem(("e",), (0,), (planner.Site("blocks.0", (option,)),))
        with Session(model) as session, pytest.raises(error, match=say):
            planner.apply(session, planner.solve(other, 1))


def test_another_device_is_solved_from_the_same_profile(profiled):
    found = with_times(profiled[2])
    slow = found.scaled(3.0)
    budget = max(found.problem().live([0] * 6)) * 3 // 4
    times = [planner.solve(p.problem(), budget, explain=False).time for p in (found, slow)]
    assert times[1] == 3 * times[0] > 0


def agree(rank, world_size, budgets):
    """Solve on every rank for its own budget, and install where all agree."""
    model, _ = make()
    options = (
        planner.LayerOption("keep", 100, 100, 100),
        planner.LayerOption("recompute", 9, 9, 9, 1, actions=(("blocks.0", "recompute"),)),
    )
    made = planner.solve(planner.chain([planner.Layer("blocks.0", options)]), budgets[rank])
    with Session(model) as session:
        try:
            planner.apply(session, made, group=torch.distributed.group.WORLD)
        except MemoryFeatureError as refused:
            return refused.code, str(refused)
        return "", [a.module for a in session.actions]


def test_plan_hash_between_ranks():
    assert run_ranks(agree, 2, (50, 50)) == [("", ["blocks.0"])] * 2
    found = run_ranks(agree, 2, (50, 500))
    assert [code for code, _ in found] == ["E-M31", "E-M31"]
    assert "ranks [1]" in found[0][1]
    assert "ranks [0]" in found[1][1]


def test_digests_travel_on_the_device_of_the_group(monkeypatch):
    """All but gloo send from the device, which a session names by its kind."""
    module = importlib.import_module("ms_memory.planner.apply")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        device = Session(nn.Linear(1, 1)).device
        digest = "ab" * 32
        assert module._digests(digest, dist.group.WORLD, device) == {0: digest}
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
