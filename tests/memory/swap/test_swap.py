"""Swapped activations: the same gradients at every schedule, bytes that leave, host memory back."""

import contextlib
import gc
import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ms_memory import device, recompute, swap
from ms_memory.device import VirtualClock
from ms_memory.errors import MemoryFeatureError
from ms_memory.session import Session
from ms_memory.swap import prefetch
from support.swapping import (
    HIDDEN,
    TOKENS,
    Work,
    build,
    grads,
    loss_of,
    same,
    swapped,
    tokens,
)

SEEDS = range(50)
SCHEDULES = {"early": ["early"], "late": ["late"], "random": SEEDS}


def step(model, batches=(0,)):
    torch.manual_seed(9)
    for seed in batches:
        loss_of(model(tokens(seed)), seed).backward()
    return grads(model)


@pytest.fixture(scope="module")
def plain():
    model = build(dropout=0.2)
    return model, step(model)


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(plain, schedules):
    model, wanted = plain
    for schedule in schedules:
        with swapped(model, schedule) as session:
            assert same(step(model), wanted)
            assert session.host.ledger.total > 0


def test_depths_layers_and_a_plan_of_attention(plain):
    model, wanted = plain
    for depth in (0, 1, 2, 9):
        with swapped(model, depth=depth):
            assert same(step(model), wanted)
    for layers, count in (("auto", 3), (2, 2), (slice(1, 3), 2), (lambda i: i == 3, 1)):
        with Session(model, device=device.sim()) as session:
            moved = swap.modules(session, "layers.*", layers=layers, min_bytes=0)
            assert len(moved.names) == count
            assert same(step(model), wanted)
    with swapped(model, plan=["layers.*.qkv", "layers.*.out"]) as session:
        assert same(step(model), wanted)
        # Each keeps its input only.
        assert session.host.ledger.peak == 4 * 2 * TOKENS * HIDDEN * 4


def fault_no_wait_back(self):
    self.fetch()
    return self._fetched


def fault_early_release(self):
    holder = self._holder and self._holder()
    if not self.released and holder is not None:
        holder.tensor = None
        self.released = True


FAULTS = {
    "missing wait": ("get", fault_no_wait_back),
    "early free": ("release", fault_early_release),
}


@pytest.mark.parametrize(("name", "fault"), FAULTS.values(), ids=FAULTS)
def test_seeded_bugs_are_caught(plain, monkeypatch, name, fault):
    model, wanted = plain
    monkeypatch.setattr(prefetch._Item, name, fault)
    found = {}
    for schedule in ("early", "late", *range(8)):
        with swapped(model, schedule):
            found[schedule] = not same(step(model), wanted)
    assert found["late"]
    assert any(found[seed] for seed in range(8))
    assert not found["early"]  # as on hardware that is idle


def test_live_bytes_after_forward():
    model = build()
    with Session(model) as plain_session:
        ledger = plain_session.ledger
        logits = model(tokens())
        whole = ledger.live_bytes
        loss_of(logits).backward()
    with swapped(model) as session:
        ledger = session.ledger
        logits = model(tokens())
        assert session.host.ledger.nbytes > 0
        assert ledger.nbytes == whole
        # What stays: the index, and the last layer's result, which the head saved.
        assert whole - ledger.live_bytes == session.host.ledger.nbytes
        assert ledger.live_bytes == TOKENS * 8 + TOKENS * HIDDEN * 4
        loss_of(logits).backward()


def test_views_single_copy():
    model = build(layers=1)
    sim = device.sim()
    copies = []
    original = sim.d2h.copy
    sim.d2h.copy = lambda pairs: copies.append(pairs[0][1].numel()) or original(pairs)
    with swapped(model, sim=sim) as session:
        logits = model(tokens())
        # q, k and v are three saved views of one storage; its transposes are no copies either.
        assert copies.count(3 * TOKENS * HIDDEN) == 1
        assert session.host.ledger.nbytes == 4 * sum(copies)
        loss_of(logits).backward()
        assert session.host.ledger.nbytes == 0


def test_host_pool_balanced():
    model = build()
    wanted = step(model, (0, 1, 2))
    sim = device.sim()
    with swapped(model, sim=sim) as session:
        for _ in range(3):
            assert same(step(model, (0, 1, 2)), wanted)
            assert session.host.ledger.nbytes == 0
            pinned = sim.stats().pinned
        step(model)
        assert sim.stats().pinned == pinned  # later steps allocate nothing


def lifo(run):
    for batch in range(3):
        run.forward(batch)
    for batch in reversed(range(3)):
        run.backward(batch)


def one_forward_one_backward(run):
    run.forward(0)
    run.forward(1)
    for batch in range(2, 4):
        run.backward(batch - 2)
        run.forward(batch)
    run.backward(2)
    run.backward(3)


def interleaved(run):
    for batch in (0, 1):
        run.chunk_forward(0, batch)
    for batch in (0, 1):
        run.chunk_forward(1, batch)
        run.chunk_backward(1, batch)
        run.chunk_forward(0, batch + 2)
    for batch in (2, 3):
        run.chunk_forward(1, batch)
    for chunk, batch in ((0, 0), (1, 3), (0, 1), (1, 2), (0, 2), (0, 3)):
        run.chunk_backward(chunk, batch)


class Chunks:
    """Two pipeline chunks whose forwards and backwards run in any order."""

    def __init__(self, models):
        self.models = models
        self.sent, self.inputs, self.outputs = {}, {}, {}

    def forward(self, batch):
        self.chunk_forward(0, batch)
        self.chunk_forward(1, batch)

    def backward(self, batch):
        self.chunk_backward(1, batch)
        self.chunk_backward(0, batch)

    def chunk_forward(self, chunk, batch):
        x = torch.full((TOKENS, HIDDEN), batch + 1.0) if chunk == 0 else self.sent[batch]
        x = x.detach().cos().requires_grad_()
        self.inputs[chunk, batch] = x
        y = self.outputs[chunk, batch] = self.models[chunk](x)
        self.sent[batch] = y

    def chunk_backward(self, chunk, batch):
        y = self.outputs.pop((chunk, batch))
        grad = torch.full_like(y, 0.5) if chunk == 1 else self.inputs.pop((1, batch)).grad
        y.backward(grad)


@pytest.mark.parametrize("order", [lifo, one_forward_one_backward, interleaved])
def test_pp_orders(order):
    chunks = [build(seed=s).layers for s in (1, 2)]
    models = [nn.Sequential(*layers) for layers in chunks]
    order(Chunks(models))
    wanted = [grads(m) for m in models]
    for schedule in ("early", "late", 3, 4, 5):
        sim = device.sim(schedule=schedule)
        sessions = [swapped(m, sim=sim, plan="*", depth=2) for m in models]
        order(Chunks(models))
        assert all(same(grads(m), w) for m, w in zip(models, wanted, strict=True))
        for session in sessions:
            assert session.host.ledger.nbytes == 0
            session.close()


class Breaks(nn.Module):
    def forward(self, x):
        raise ArithmeticError("as asked")


@pytest.mark.parametrize("schedule", ["early", "late", 7])
def test_exception_in_forward_releases_host(schedule):
    model = build()
    wanted = step(model)
    with swapped(model, schedule) as session:
        kept, model.layers[2] = model.layers[2], Breaks()
        with pytest.raises(ArithmeticError):
            model(tokens())
        model.layers[2] = kept
        gc.collect()
        assert session.host.ledger.total > 0
        assert session.host.ledger.nbytes == 0
        assert same(step(model), wanted)


class Timed(nn.Module):
    """Saves `numel` fp32 numbers and takes time."""

    def __init__(self, clock, ns, numel):
        super().__init__()
        self.clock, self.ns, self.numel = clock, ns, numel
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        big = x.repeat(self.numel) * self.weight  # saves the repeated tensor
        return Work.apply(big.sum().view(1), self.clock, self.ns)


def stalls(numels, depth, ns=1000):
    """Return nanoseconds that a step waits for copies of one byte a nanosecond."""
    clock = VirtualClock(10**9, 10**9)
    model = nn.Sequential(*(Timed(clock, ns, n) for n in (*numels, 1)))
    with swapped(model, plan="*", clock=clock, depth=depth, layers="auto"):
        out = model(torch.ones(1))
        forward = clock.stalled
        out.backward()
    assert clock.now == clock.stalled + 3 * ns * (len(numels) + 1)
    return forward, clock.stalled - forward


def test_prefetch_depth_hides():
    # Copies of 1000 ns behind modules of 1000 ns forward and 2000 ns backward.
    assert stalls([250] * 4, depth=1) == (0, 0)
    assert stalls([250] * 4, depth=0)[1] == 4 * 1000
    # One large storage needs the time of two modules.
    large = [250, 250, 750, 0, 0]
    assert stalls([500] * 4, depth=1)[1] == 0
    assert stalls([250, 250, 1000, 1, 1], depth=1)[1] > 0
    assert stalls([250, 250, 1000, 1, 1], depth=2)[1] == 0
    assert sum(stalls([*large[:3], 1, 1], depth=3)) == 0


class Checkpointed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Region(layer) for layer in layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Region(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_inputs_of_recomputed_layers_move():
    layers, batches = 5, 3
    model = Checkpointed(build(layers).layers)
    xs = [torch.full((TOKENS, HIDDEN), b + 1.0, requires_grad=True) * 1 for b in range(batches)]
    for x in xs:
        model(x * 2).sum().backward(retain_graph=True)
    wanted = grads(model)
    with swapped(model, layers="auto") as session:
        outputs = [model(x * 2) for x in xs]
        # The first input is the caller's, the last layer does not move.
        expected = (layers - 2) * batches * TOKENS * HIDDEN * 4
        assert session.host.ledger.nbytes == expected
        for y in outputs:
            y.sum().backward(retain_graph=True)
        assert same(grads(model), wanted)
        del y, outputs
        gc.collect()
        assert session.host.ledger.nbytes == 0


def test_retain_graph_fetches_again():
    model = build()
    loss = loss_of(model(tokens()))
    loss.backward(retain_graph=True)
    loss.backward()
    wanted = grads(model)
    for schedule in ("early", "late", *range(5)):
        sim = device.sim(schedule=schedule)
        with swapped(model, sim=sim) as session:
            loss = loss_of(model(tokens()))
            loss.backward(retain_graph=True)
            assert session.host.ledger.nbytes > 0
            # All but the first two layers' copies on the device are gone again.
            assert sim.stats().allocated <= session.host.ledger.nbytes // 2
            loss.backward()
            assert same(grads(model), wanted)
            assert session.host.ledger.nbytes == 0


def test_a_graph_outlives_the_session_and_part_of_it_may_die():
    model = build()
    wanted = step(model)
    session = swapped(model)
    loss = loss_of(model(tokens()))
    session.close()
    loss.backward()
    assert same(grads(model), wanted)
    assert session.host.ledger.nbytes == 0
    with swapped(model) as session:
        logits = model(tokens())
        loss = loss_of(logits)
        prefetching = logits.grad_fn.next_functions
        assert prefetching
        del loss, logits, prefetching
        gc.collect()
        assert session.host.ledger.nbytes == 0


def test_eval_no_grad_frozen_and_autocast():
    model = build()
    for p in model.layers[1].parameters():
        p.requires_grad_(False)

    def mixed():
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model(tokens()).float()).backward()
        return grads(model)

    wanted, cast = step(model), mixed()
    with swapped(model) as session:
        with torch.no_grad():
            model(tokens())
        assert session.host.ledger.total == 0
        model.eval()
        assert same(step(model), wanted)
        assert same(mixed(), cast)


def test_small_and_excluded_storages_stay():
    model = build()
    with swapped(model, min_bytes=TOKENS * 2 * HIDDEN * 4) as session:
        loss_of(model(tokens())).backward()
        per_layer = 3 * TOKENS * HIDDEN * 4 + TOKENS * 2 * HIDDEN * 4
        assert session.host.ledger.peak == 4 * per_layer
    with swapped(model, exclude=lambda t: True) as session:
        loss_of(model(tokens())).backward()
        assert session.host.ledger.total == 0


def test_what_is_refused():
    model = build()
    with Session(model) as session, pytest.raises(RuntimeError, match="frees nothing here"):
        swap.modules(session, "layers.*")
    with Session(model, device=device.sim()) as session:
        with pytest.raises(MemoryFeatureError, match=r"E-M22.*layers\.0"):
            swap.modules(session, ["layer.*"])
        with pytest.raises(ValueError, match="depth"):
            swap.modules(session, "layers.*", depth=-1)
    with swapped(model) as session, pytest.raises(MemoryFeatureError, match="E-M10"):
        swap.modules(session, "layers.1")
    with swapped(model, host=3000) as session:
        with pytest.raises(MemoryFeatureError, match="E-M32"):
            model(tokens())
        gc.collect()
        assert session.host.ledger.nbytes == 0


def test_with_recomputation_and_discarded_outputs():
    model = build()
    wanted = step(model)
    acts = {
        "norms": lambda s: recompute.norms(s),
        "region": lambda s: recompute.modules(s, ["layers.*.down"]),
        "inputs": lambda s: recompute.modules(s, ["layers.?"], offload_inputs=True, min_bytes=0),
    }
    totals = {}
    for (name, act), schedule in itertools.product(acts.items(), ("early", "late", 3, 4)):
        with Session(model, device=device.sim(schedule=schedule)) as session:
            act(session)
            if name != "inputs":
                swap.modules(session, ["layers.?"], min_bytes=0, layers=None)
            assert same(step(model), wanted), (name, schedule)
            totals[name] = session.host.ledger.total
            assert session.host.ledger.nbytes == 0
    # Of four layers the last one's input stays; the first one's is no input of the model.
    assert totals["inputs"] == 3 * TOKENS * HIDDEN * 4


def test_a_write_to_what_left_is_noticed():
    model = build(layers=2)
    with swapped(model) as session:
        seen = []
        handle = model.layers[0].up.register_forward_hook(lambda m, a, out: seen.append(out))
        logits = model(tokens())
        handle.remove()
        seen[0].detach().mul_(2)  # tanh saved its result, not this: nothing is hurt
        loss_of(logits).backward()
        handle = model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out))
        logits = model(tokens())
        handle.remove()
        seen[1].detach().mul_(2)  # the next norm saved it
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss_of(logits).backward()
        seen.clear()
        del logits
        gc.collect()
        assert session.host.ledger.nbytes == 0


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table):
        ctx.save_for_backward(table)
        return x * table

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_table_that_all_layers_save_comes_back_once(depth):
    class Layer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, table):
            return Times.apply(self.inner(x), table)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(nn.Linear(HIDDEN, HIDDEN)) for _ in range(5))

        def forward(self, x):
            table = x.detach().cos()
            x = x * 1
            for layer in self.layers:
                x = layer(x, table)
            return x

    torch.manual_seed(1)
    model, x = Model(), torch.randn(TOKENS, HIDDEN)
    model(x).sum().backward()
    wanted = grads(model)
    sim = device.sim()
    back = []
    original = sim.h2d.copy
    sim.h2d.copy = lambda pairs: back.append(pairs[0][1].numel()) or original(pairs)
    with swapped(model, sim=sim, depth=depth, layers="auto") as session:
        model(x).sum().backward()
        assert same(grads(model), wanted)
        # The inputs of four layers and the table.
        assert len(back) == 5
        assert session.host.ledger.nbytes == 0


class Emptied(nn.Module):
    """Empties what a layer saved, as frameworks do that compute it again by themselves."""

    def forward(self, x):
        y = x * 1
        z = Times.apply(x, y)
        y.untyped_storage().resize_(0)
        return z


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_a_tensor_that_somebody_empties_is_refused(schedule):
    model = build(layers=2)
    model.layers.append(Emptied())
    with swapped(model, schedule) as session:
        with pytest.raises(MemoryFeatureError, match=r"E-M10: .*'layers\.2' was emptied while"):
            model(tokens())
        gc.collect()
        assert session.host.ledger.nbytes == 0


class Busy:
    """A torch device module whose copies are never known to have ended."""

    def __init__(self):
        self.calls = Counter()

    def Stream(self):
        return self

    current_stream = Stream

    def Event(self):
        return self

    @contextlib.contextmanager
    def stream(self, stream):
        self.calls["copy"] += 1
        yield

    def record(self, stream):
        self.calls["record"] += 1

    def wait_event(self, event):
        self.calls["wait"] += 1

    def query(self):
        self.calls["query"] += 1
        return False

    def synchronize(self):
        self.calls["synchronize"] += 1


def test_the_program_never_waits(plain):
    model, wanted = plain
    busy = Busy()
    with Session(model, device=device.Accelerator("cpu", busy)) as session:
        swap.modules(session, "layers.*", layers=None, min_bytes=0, pin=False)
        assert same(step(model), wanted)
        busy.calls.clear()
        assert same(step(model), wanted)
    # An event before and one after each copy. Six waits of streams for the two copies of a tensor:
    # each for its event before, the way back for the way out, the program's for both, and once
    # more when the tensor dies. Some are loaded twice.
    assert busy.calls["synchronize"] == 0
    assert busy.calls["record"] == 2 * busy.calls["copy"]
    assert 3 * busy.calls["copy"] <= busy.calls["wait"] < 4 * busy.calls["copy"]
