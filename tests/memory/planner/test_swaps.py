"""Plans that mix all actions on the simulated device: bytes and stalls as predicted."""

import gc
import random
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from ms_memory import MemoryFeatureError, device, planner
from ms_memory.session import Session
from ms_memory.swap.windows import Windows
from support.gpt import Block, Shape, gpt, tokens
from support.swapping import Work

SHAPE = Shape(layers=4, dropout=0.1)
NS = 1500  # of a layer's forward; copies of a byte take a nanosecond
NAMES = [f"layers.{i}" for i in range(SHAPE.layers)]


class Timed(Block):
    """A layer that computes first and saves then: its copies have the next layer's time alone."""

    def __init__(self, shape):
        super().__init__(shape)
        self.clock = None

    def forward(self, x):
        return super().forward(x if self.clock is None else Work.apply(x, self.clock, NS))


def build():
    model = gpt(SHAPE)
    for layer in model.layers:
        layer.__class__, layer.clock = Timed, None
    return model


def simulated(model, schedule="late"):
    clock = device.VirtualClock(10**9, 10**9, 7)
    for layer in model.layers:
        layer.clock = clock
    return device.sim(schedule=schedule, clock=clock)


def loss_of(model):
    x = tokens(SHAPE)
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


@pytest.fixture(scope="module")
def profiled():
    model = build()
    step = partial(loss_of, model)
    with Session(model, device=simulated(model)) as session:
        found = planner.profile(session, step, min_bytes=1, steps=1)
        assert session.actions == []
    return model, step, found


def gradients(model):
    model.zero_grad()
    torch.manual_seed(5)
    loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters()]


def mixed(found, pick):
    """A plan with one option a layer."""
    pins = {layer.name: pick(layer.options).name for layer in found.layers[1:-1]}
    return planner.solve(found.problem(), 10**9, pins=pins, explain=False)


def test_profile_times_and_copies(profiled):
    """The virtual clock gives exact times; swaps are composed for every combination."""
    layer = profiled[2].layers[1]
    assert (layer.forward_time, layer.backward_time) == (NS, 2 * NS)
    options = {o.name: o for o in layer.options}
    assert len(options) == 44
    assert options["recompute"].time == NS
    assert options["norms + activation"].time == options["keep"].time == 0
    swap, both = options["swap"], options["norms + activation + swap attention"]
    assert swap.leaving == options["keep"].held - swap.held
    assert swap.out_time == swap.back_time > swap.leaving
    size = 4 * 2 * 5
    freed = options["norms"].held - options["keep"].held
    assert freed == -2 * size * (SHAPE.width + 2)
    # The attention's input is a norm's output: it is discarded, not swapped.
    assert options["swap attention"].leaving - both.leaving == size * SHAPE.width
    assert profiled[2].layers[-2].options[-1].leaving == 0


def test_predicted_equals_measured_peak_sim(profiled):
    model, step, found = profiled
    generator = random.Random(3)
    want, done, stalls = gradients(model), set(), []
    for schedule in ("early", "late", 1, 2, 3, 4, 5, 6):
        made = mixed(found, generator.choice)
        with Session(model, device=simulated(model, schedule)) as session:
            planner.apply(session, made)
            seen = planner.verify(session, step, made)
            assert seen.measured == seen.predicted == made.peak
            assert 0 <= seen.stall <= made.stall
            if schedule in ("early", "late", 1):
                got = gradients(model)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert session.host.ledger.nbytes == 0
            # Sizes of blocks are counted: all of a forward's are out at one time.
            assert session.host.held == made.host
        done |= {action for d in made.decisions for _, action in d.option.actions}
        stalls.append(seen.stall)
    assert done == {"discard", "recompute", "swap"}
    assert any(stalls)


def test_predicted_equals_measured_stall(profiled):
    """Without recomputation, which lengthens the windows, the bound is what is measured."""
    model, step, found = profiled
    for seed in range(3):
        generator = random.Random(seed)

        def pick(options, generator=generator):
            return generator.choice([o for o in options if "recompute" not in o.name])

        made = mixed(found, pick)
        with Session(model, device=simulated(model)) as session:
            planner.apply(session, made)
            assert planner.verify(session, step, made).stall == made.stall > 0


def two_batches(model, order):
    """Gradients of two micro-batches in flight; the second one's graph is used twice."""
    model.zero_grad()
    torch.manual_seed(6)
    losses = [loss_of(model), 2 * loss_of(model)]
    with torch.no_grad():
        loss_of(model)
    for index in order:
        losses[index].backward(retain_graph=index == 1)
    losses[1].backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("schedule", ["early", "late", 1])
def test_windows_reentry(profiled, schedule):
    """Micro-batches in either order, a graph used twice, no gradients, a forward that fails."""
    model, _, found = profiled
    made = mixed(found, lambda options: options[-1])
    assert made.decisions[1].option.name.endswith("swap")
    want = {order: two_batches(model, order) for order in ((0, 1), (1, 0))}
    with Session(model, device=simulated(model, schedule)) as session:
        planner.apply(session, made)
        for order, plain in want.items():
            assert all(map(torch.equal, two_batches(model, order), plain))
            gc.collect()
            assert session.host.ledger.nbytes == 0
        kept, model.head = model.head, None
        with pytest.raises(TypeError):
            model(tokens(SHAPE))
        model.head = kept
        gc.collect()
        assert session.host.ledger.nbytes == 0
        assert all(map(torch.equal, two_batches(model, (0, 1)), want[0, 1]))


def test_late_release_shows(profiled, monkeypatch):
    """Storages that leave one layer later than planned are more bytes than predicted."""
    model, step, found = profiled
    swap = {"layers.0": "swap", "layers.1": "swap", "layers.2": "swap", "layers.3": "keep"}
    made = planner.solve(found.problem(), 10**9, pins=swap, explain=False)
    original = Windows._release
    monkeypatch.setattr(
        Windows, "_release", lambda self, step, stop: original(self, step, stop - 1)
    )
    with Session(model, device=simulated(model)) as session:
        planner.apply(session, made)
        seen = planner.verify(session, step, made)
    assert seen.measured > seen.predicted


def test_plan_end_to_end_swaps(profiled):
    """On a model, with copies that take no time."""
    model, step, found = profiled
    budget = max(found.problem().live([0] * 6)) * 3 // 4
    want = gradients(model)
    model.zero_grad()
    free = device.sim()
    few = ("discard", "swap")
    with planner.plan(model, step, budget, actions=few, device=free, min_bytes=1) as installed:
        assert installed.verified.measured == installed.verified.predicted <= budget
        assert "swap" in installed.plan.actions().values()
        got = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_session_in_use_and_chunks(profiled):
    model, step, found = profiled
    with Session(model) as session:
        planner.apply(session, mixed(found, lambda options: options[1]))
        with pytest.raises(MemoryFeatureError, match=r"E-M20.*before anything"):
            planner.profile(session, step)
    problem = planner.joined([found, found], [3, 2])
    pins = {"0:layers.1": "recompute", "0:layers.[02]": "keep"}
    pins |= {"1:layers.[012]": "swap attention", "?:layers.3": "keep"}
    made = planner.solve(problem, 10**9, pins=pins, explain=False)
    other = build()
    with Session(model) as first, Session(other, device=device.sim()) as second:
        planner.apply([first, second], made)
        assert [a.module for a in first.actions] == ["layers.1"]
        kept = second.model(tokens(SHAPE))
        size = {o.name: o for o in found.layers[1].options}["swap attention"].leaving
        assert second.host.ledger.total == second.host.ledger.nbytes == 3 * size
        del kept
        with pytest.raises(ValueError, match="one for each planned chunk"):
            planner.apply([first], made)
    merged = planner.Profile.merged([found, found.scaled(2.0, copies=3.0)])
    assert merged.layers[1].forward_time == NS
    assert merged.layers[1].options[-1].out_time == 3 * found.layers[1].options[-1].out_time
    with pytest.raises(ValueError, match="other layers"):
        planner.Profile.merged([found, planner.Profile(found.layers[1:], 0, 0, 0, 1)])
