"""Whole modules computed again: bytes, gradients, who starts the second run."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ms_memory import Session, device, recompute
from ms_memory.errors import MemoryFeatureError
from ms_memory.ledger import SavedLedger, StorageCensus
from ms_memory.recompute import DeferredCheckpoint, activation, modules, norms, segments
from support.gpt import Shape, gpt, tokens
from support.gradients import GATED, MATRIX, PLAIN, all_equal, check, run
from support.mutation import Mutation, assert_caught

KEPT = 4 * 10 * PLAIN.width  # the input of one layer


def layers(session):
    assert modules(session, "layers.?") == [f"layers.{i}" for i in range(3)]


def mixed(session):
    modules(session, ["layers.0"])
    modules(session, "layers.[12].attn")
    activation(session, layers=slice(1, None))
    norms(session, layers=slice(1, None))


def nested(session):
    modules(session, "layers.1.mlp")
    modules(session, "layers.?.attn", early_stop=False)


def under(apply):
    """What puts a model under a feature."""

    @contextlib.contextmanager
    def applied(model):
        with Session(model) as session:
            apply(session)
            yield

    return applied


@pytest.mark.parametrize("name", MATRIX)
def test_grad_bitequal(name):
    check(name, under(layers))


@pytest.mark.parametrize("apply", [mixed, nested])
def test_combined(apply):
    for name in ("dropout", "autocast", "retain_graph"):
        check(name, under(apply))


def test_inside_another_region():
    """A region in a region: a session around layers that recompute their parts themselves."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = DeferredCheckpoint()(lambda t: nn.functional.dropout(self.a(t).tanh()), x)
            return self.b(y).exp()

    torch.manual_seed(0)
    model = nn.Sequential(Inner(), Inner())
    x = torch.randn(3, 4)
    found = []
    for apply in (False, True):
        model.zero_grad()
        torch.manual_seed(2)
        if apply:
            modules(Session(model), "?")
        model(x).sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all_equal(*found)


def test_bytes():
    """Of each layer its input alone; the interior of one comes back at a time."""
    model = gpt(PLAIN)
    x = torch.randn(2, 5, PLAIN.width, requires_grad=True)

    def body(x):
        for layer in model.layers:
            x = layer(x)
        return x

    with SavedLedger(exclude=model) as ledger:
        body(x)
    whole = ledger.nbytes
    with Session(model) as session:
        layers(session)
        with SavedLedger(exclude=model) as ledger:
            out = body(x)
        assert (ledger.nbytes, ledger.live_bytes) == (3 * KEPT, 3 * KEPT)
        with StorageCensus() as census:
            out.sum().backward()
        assert census.peak < whole
        assert ledger.live_bytes <= KEPT  # x itself, which the caller holds


def test_early_stop():
    calls = []

    class Tail(nn.Module):
        def forward(self, x):
            y = x.exp()
            calls.append("saved")
            z = y + 1
            calls.append("tail")
            return z

    for stop, expected in ((True, 2), (False, 4)):
        calls.clear()
        model = nn.ModuleList([Tail()])
        with Session(model) as session:
            modules(session, "0", early_stop=stop)
            model[0](torch.ones(2, requires_grad=True)).sum().backward()
        assert len(calls) == expected


def test_sac():
    matmul = torch.ops.aten.mm.default
    plain = run(gpt(GATED), GATED)
    for policy in ([matmul], _policy):
        model = gpt(GATED)
        with Session(model) as session:
            modules(session, "layers.?", granularity="sac", policy=policy)
            assert all_equal(run(model, GATED), plain)
            count = _Count(matmul)
            loss = model(tokens(GATED)).sum()
            with count:
                loss.backward()
        # Two products for each linear layer, none again.
        assert count.seen == 2 * (3 * 5 + 1)


def _policy(ctx, op, *args, **kwargs):
    policies = torch.utils.checkpoint.CheckpointPolicy
    saves = op is torch.ops.aten.mm.default
    return policies.MUST_SAVE if saves else policies.PREFER_RECOMPUTE


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.seen = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func is self.op
        return func(*args, **(kwargs or {}))


def _offloads(ctx, op, *args, **kwargs):
    """Products go to the host, softmax stays, the rest is computed again."""
    if op is torch.ops.aten.mm.default:
        return recompute.MUST_CPU_OFFLOAD
    policies = torch.utils.checkpoint.CheckpointPolicy
    saves = op is torch.ops.aten._softmax.default
    return policies.MUST_SAVE if saves else policies.PREFER_RECOMPUTE


@pytest.mark.parametrize("schedule", ["early", "late", 1, 2, 3])
def test_sac_cpu_offload_is_real(schedule):
    """The products' results lie on the host between the two runs, and are not computed again."""
    matmul, softmax = torch.ops.aten.mm.default, torch.ops.aten._softmax.default
    shape = replace(GATED, dropout=0.2)
    plain = run(gpt(shape), shape)
    model = gpt(shape)
    with Session(model, device=device.sim(schedule=schedule)) as session:
        modules(session, "layers.?", granularity="sac", policy=_offloads)
        assert all_equal(run(model, shape), plain)
        loss = model(tokens(shape)).sum()
        # Q, K, V and the attention's output, gate, up and down of each layer, on 10 tokens.
        numbers = shape.layers * 10 * (4 * shape.width + 2 * shape.hidden + shape.width)
        assert session.host.ledger.nbytes == 4 * numbers
        with _Count(matmul) as products, _Count(softmax) as softmaxes:
            loss.backward()
        assert products.seen == 2 * (3 * 5 + 1)
        assert softmaxes.seen == 0
        del loss
        assert session.host.ledger.nbytes == 0


def test_sac_cpu_offload_frees_the_device():
    """Counted by a census: what went to the host is not alive here after the forward."""
    found, host = {}, 0
    keep = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    for name in ("offload", "keep"):
        model = gpt(GATED)
        products = {"offload": recompute.MUST_CPU_OFFLOAD, "keep": keep}[name]
        answers = {torch.ops.aten.mm.default: products}
        with Session(model, device=device.sim()) as session, StorageCensus() as census:
            policy = partial(_answer, answers)
            modules(session, "layers.?", granularity="sac", policy=policy)
            out = model(tokens(GATED))
            found[name] = census.sweep()
            host = max(host, session.host.ledger.nbytes)
            del out
    assert found["keep"] - found["offload"] == host > 0


def _answer(answers, ctx, op, *args, **kwargs):
    return answers.get(op, torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE)


class Written(nn.Module):
    """Writes to the result of its product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return nn.functional.relu_(self.linear(x)).sin()


def test_sac_cpu_offload_what_is_refused():
    model = gpt(PLAIN)
    with Session(model) as session:
        modules(session, "layers.0", granularity="sac", policy=_offloads)
        with pytest.raises(RuntimeError, match="frees nothing here"):
            model(tokens(PLAIN))
    model = nn.Sequential(Written())
    with Session(model, device=device.sim()) as session:
        modules(session, "0", granularity="sac", policy=_offloads)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            model(torch.ones(2, 4))


def test_deferred():
    weight = torch.randn(4, 4, requires_grad=True)
    calls = []

    def layer(x, scale):
        calls.append(torch.is_grad_enabled())
        return nn.functional.dropout((x @ weight).tanh() * scale, 0.5), "meta"

    x = torch.randn(3, 4, requires_grad=True)
    found = []
    for when in ("plain", "early", "late", "twice"):
        torch.manual_seed(1)
        calls.clear()
        c = DeferredCheckpoint()
        assert not c.ready
        y, name = layer(x, 2.0) if when == "plain" else c(layer, x, scale=2.0)
        assert name == "meta"
        if when in ("early", "twice"):
            assert not c.ready
            c.materialize()
            c.materialize()
            assert c.ready
            assert len(calls) == 2
            torch.manual_seed(77)  # the backward draws nothing any more
        found.append(torch.autograd.grad(y.sum(), (x, weight), retain_graph=when == "twice"))
        if when == "twice":
            found.append(torch.autograd.grad(y.sum(), (x, weight)))
        assert len(calls) == (1 if when == "plain" else 2)
    assert all(all_equal(found[0], other) for other in found)


def test_deferred_chunks_in_flight():
    """Bytes of chunks that wait, that are ready, and that are done."""
    model = gpt(PLAIN)
    x = torch.randn(2, 5, PLAIN.width)
    with SavedLedger(exclude=[*model.parameters(), x]) as ledger:
        chunks = [DeferredCheckpoint() for _ in range(3)]
        outs = [c(model.layers[0], x) for c in chunks]
    assert ledger.nbytes == 0  # x alone, which counts elsewhere
    with StorageCensus() as census:
        base = census.sweep()
        chunks[0].materialize()
        one = census.sweep() - base
        chunks[1].materialize()
        two = census.sweep() - base
        assert one > 0
        assert two == 2 * one
        for out, held in zip(outs[:2], (one, 0), strict=True):
            out.sum().backward()
            model.zero_grad()
            del out
            assert census.sweep() - base == held


def test_deferred_misuse():
    c = DeferredCheckpoint()
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        c.materialize()
    with torch.no_grad():
        c(torch.exp, torch.ones(2))
    assert c.ready
    c.materialize()
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        c(torch.exp, torch.ones(2))
    with pytest.raises(ValueError, match="rng"):
        DeferredCheckpoint(rng="no")


def test_uniform_nondivisible():
    """Any number of layers and any size: every layer once, in order; ceil(L / k) inputs kept."""
    for count in range(9):
        for size in range(1, 11):
            runs = segments(count, "uniform", size)
            assert [i for r in runs for i in r] == list(range(count))
            assert len(runs) == -(-count // size)
    model = gpt(Shape(layers=5))
    x = torch.randn(2, 5, PLAIN.width, requires_grad=True)

    def chain(part):
        def body(x):
            for i in part:
                x = model.layers[i](x)
            return x

        return body

    y = chain(range(5))(x)
    expected = torch.autograd.grad(y.sum(), (x, *model.layers.parameters()))
    with SavedLedger(exclude=model) as ledger:
        y = x
        for part in segments(5, "uniform", 2):
            y = DeferredCheckpoint()(chain(part), y)
    assert ledger.nbytes == 3 * KEPT
    assert all_equal(torch.autograd.grad(y.sum(), (x, *model.layers.parameters())), expected)


def test_block():
    assert segments(4, "block", 2) == [range(1), range(1, 2)]
    assert segments(4, "block", 0) == []
    wrong = ((4, "block", 5), (4, "block", -1), (4, "uniform", 0), (4, "other", 1))
    for args in wrong:
        with pytest.raises(ValueError, match="segments"):
            segments(*args)


def test_refused():
    with Session(gpt(PLAIN)) as session:
        with pytest.raises(MemoryFeatureError, match=r"E-M22.*layers\.0"):
            modules(session, "layer.0")
        with pytest.raises(MemoryFeatureError, match="E-M22"):
            modules(session, lambda name, module: False)
        with pytest.raises(ValueError, match="granularity"):
            modules(session, "*", granularity="op")
        with pytest.raises(ValueError, match="policy"):
            modules(session, "*", granularity="sac")
        with pytest.raises(ValueError, match="policy"):
            modules(session, "*", policy=_policy)
        activation(session, layers=1)
        with pytest.raises(MemoryFeatureError, match="E-M05"):
            modules(session, "layers.0")
        modules(session, "layers.1")
        with pytest.raises(MemoryFeatureError, match="E-M05"):
            norms(session, layers=slice(1, 2))
        with pytest.raises(MemoryFeatureError, match="E-M05"):
            modules(session, "layers.1.attn")
        with pytest.raises(MemoryFeatureError, match="E-M10"):
            modules(session, "layers.1")


def test_all_pairs():
    """Each pair of features: equal gradients, or a code."""
    features = {
        "activation": activation,
        "norms": norms,
        "layers": lambda s: modules(s, "layers.?"),
        "attention": lambda s: modules(s, "layers.?.attn"),
    }
    expected = run(gpt(GATED), GATED)
    refused = set()
    for first in features:
        for second in features:
            model = gpt(GATED)
            with Session(model) as session:
                features[first](session)
                try:
                    features[second](session)
                except MemoryFeatureError as error:
                    refused.add((first, second, error.code))
                    continue
                assert all_equal(run(model, GATED), expected)
    inner = ("activation", "norms", "attention")
    assert refused == {
        *((f, f, "E-M10") for f in features),
        *((i, "layers", "E-M05") for i in inner),
        *(("layers", i, "E-M05") for i in inner),
    }


MUTATION = Mutation(
    "the second run does not find the random state",
    "ms_memory.recompute.replay:Replay.again",
    "zip(self._states, self._sources, strict=True)",
    "()",
)


def test_mutation_is_caught():
    assert_caught(MUTATION, lambda: check("dropout", under(layers)))
