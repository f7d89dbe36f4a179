"""Each pair of features on one model, in either order: the same numbers, or a code.

Features of the chain act in one session; an optimizer goes beside it, a plan has one of its own.
"""

import contextlib
import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from ms_memory import PackedAdamW, Session, Streamed, device, planner, swap
from ms_memory.errors import MemoryFeatureError
from ms_memory.recompute import activation, modules, norms
from support.gpt import gpt, tokens
from support.gradients import GATED

ACTS = {
    "activation": activation,
    "norms": norms,
    "layers": lambda s: modules(s, "layers.?"),
    "attention": lambda s: modules(s, "layers.?.attn"),
    "inputs": lambda s: modules(s, "layers.?", offload_inputs=True, min_bytes=0),
    "swap": lambda s: swap.modules(s, "layers.?", min_bytes=0),
}
FEATURES = (*ACTS, "streamed", "packed", "planner")
# Code -> the pairs that it refuses, in either order.
REFUSED = {
    "E-M05": set(itertools.product(("activation", "norms", "attention"), ("layers", "inputs"))),
    "E-M10": {
        *itertools.combinations(("layers", "inputs", "swap"), 2),
        ("streamed", "packed"),
    },
    "E-M20": set(itertools.product(ACTS, ("planner",))),
}


@functools.cache
def budget():
    """A little less than a step needs."""
    model = gpt(GATED).bfloat16()
    with planner.plan(model, lambda: loss_of(model, 0), 1 << 30, device=device.sim()) as free:
        return int(0.98 * max(free.plan.unplanned))


@contextlib.contextmanager
def under(names, model, sim):
    """Put a model under features of the chain, or under a plan."""
    with contextlib.ExitStack() as stack:
        session = None
        for name in names:
            if name == "planner":
                made = planner.plan(model, lambda: loss_of(model, 0), budget(), device=sim)
                stack.callback(made.close)
                assert any(d.freed for d in made.plan.decisions)
            elif name in ACTS:
                session = session or stack.enter_context(Session(model, device=sim))
                ACTS[name](session)
        yield


def loss_of(model, seed):
    target = tokens(GATED, seed=9).flatten()
    return F.cross_entropy(model(tokens(GATED, seed=seed)).flatten(0, 1).float(), target)


def train(names):
    """Return losses and parameters of two steps."""
    sim, model = device.sim(), gpt(GATED).bfloat16()
    parameters = list(model.parameters())
    optimizer = (PackedAdamW if "packed" in names else torch.optim.AdamW)(parameters)
    if "streamed" in names:
        optimizer = Streamed(optimizer, groups=2, device=sim)
    found = []
    with under(names, model, sim):
        for seed in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            optimizer.step()
            found += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
    return found


@pytest.fixture(scope="module")
def expected():
    # Packed masters make another trajectory than bf16 weights without any.
    return {packed: train(("packed",) if packed else ()) for packed in (False, True)}


# What is done to one model has an order; an optimizer or a plan, slow to make, goes beside it.
PAIRS = [
    *itertools.permutations(ACTS, 2),
    *((name, other) for name in ACTS for other in ("streamed", "packed", "planner")),
    *itertools.combinations(("streamed", "packed", "planner"), 2),
]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_all_pairs(expected, pair):
    codes = [code for code, pairs in REFUSED.items() if {pair, pair[::-1]} & pairs]
    if not codes:
        wanted = expected["packed" in pair]
        assert all(torch.equal(a, b) for a, b in zip(train(pair), wanted, strict=True))
        return
    with pytest.raises(MemoryFeatureError) as error:
        train(pair)
    assert [error.value.code] == codes


def test_every_feature_has_its_pairs():
    assert {frozenset(pair) for pair in PAIRS} == set(
        map(frozenset, itertools.combinations(FEATURES, 2))
    )
