"""A discarded output: exact bytes, equal gradients, and what is refused."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ms_memory.errors import MemoryFeatureError
from ms_memory.ledger import SavedLedger, StorageCensus
from ms_memory.recompute import Discard
from support.mutation import Mutation, assert_caught

TOKENS, WIDTH, HIDDEN = 12, 8, 32


class MLP(nn.Module):
    """fc1, an activation, fc2; with `discard` the activation's output is discarded."""

    def __init__(self, act=F.gelu, discard=False, dtype=torch.bfloat16, poison=True):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN, dtype=dtype)
        self.fc2 = nn.Linear(HIDDEN, WIDTH, dtype=dtype)
        self.act = act
        self.discard = discard
        self.poison = poison
        self.made = lambda: Discard()
        self.calls = 0
        self.storages = []

    def counted(self, x):
        self.calls += 1
        return self.act(x)

    def forward(self, x):
        h = self.fc1(x)
        if not self.discard:
            return self.fc2(self.counted(h))
        d = self.made()
        y = d(self.counted, h)
        self.storages.append(weakref.ref(y.untyped_storage()))
        z = self.fc2(y)
        if d.active and self.poison:
            y.untyped_storage().fill_(0xFF)  # NaNs: whoever reads them shows it
        d.release(until=z)
        return z


def pair(**kwargs):
    torch.manual_seed(0)
    plain, other = MLP(**kwargs), MLP(discard=True, **kwargs)
    other.load_state_dict(plain.state_dict())
    return plain, other


def sample(seed=1, dtype=torch.bfloat16, grad=True):
    torch.manual_seed(seed)
    return torch.randn(TOKENS, WIDTH, dtype=dtype).requires_grad_(grad)


def grads(model, x, seed=2, context=contextlib.nullcontext, steps=1):
    """Outputs, gradients and the state of the generator after a step."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = []
    for step in range(steps):
        with context():
            z = model(x + step)
        z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(z.dtype))
        found.append(z.detach())
    leaves = [p.grad for p in model.parameters()] + ([x.grad] if x.requires_grad else [])
    x.grad = None
    return [*found, *(g.clone() for g in leaves if g is not None), torch.get_rng_state()]


def check_equal(*, grad=True, **kwargs):
    plain, other = pair(**{k: v for k, v in kwargs.items() if k in ("act", "dtype")})
    rest = {k: v for k, v in kwargs.items() if k not in ("act", "dtype")}
    x = sample(dtype=kwargs.get("dtype", torch.bfloat16), grad=grad)
    expected, found = grads(plain, x, **rest), grads(other, x, **rest)
    assert len(expected) == len(found)
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)
    return plain, other


def test_bytes_exact():
    plain, other = pair()
    x = sample()
    kept = {}
    for model in (plain, other):
        with SavedLedger(exclude=model) as ledger:
            z = model(x)
        kept[model] = ledger.nbytes, ledger.live_bytes
        z.sum().backward()
        del z
        assert ledger.live_bytes == 0
    all_of_it = 2 * TOKENS * (WIDTH + 2 * HIDDEN)
    assert kept[plain] == (all_of_it, all_of_it)
    assert kept[other] == (all_of_it, 2 * TOKENS * (WIDTH + HIDDEN))


def test_census_agrees():
    plain, other = pair()
    x = sample()
    for model, kept in ((plain, 2 * HIDDEN), (other, HIDDEN)):
        with StorageCensus() as census:
            z = model(x)
            assert census.mark("forward") == 2 * TOKENS * (kept + WIDTH)  # and the output
            z.backward(torch.ones_like(z))
            for p in (*model.parameters(), x):
                p.grad = None
            del z
            assert census.mark("backward") == 0
    assert all(ref() is None for ref in other.storages)


def test_grad_bitequal():
    plain, other = check_equal(steps=3)
    assert (plain.calls, other.calls) == (3, 6)
    check_equal(act=torch.tanh)  # saves its own output
    check_equal(grad=False)
    check_equal(dtype=torch.float32)


def test_frozen():
    for frozen in ("fc1", "fc2"):
        plain, other = pair()
        for model in (plain, other):
            getattr(model, frozen).requires_grad_(False)
        for grad in (True, False):
            x = sample(grad=grad)
            expected, found = grads(plain, x), grads(other, x)
            assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "fn", [lambda x: x, lambda x: x.view(-1), lambda x: (x * 2, x[1:]), nn.Identity()]
)
def test_alias_refused(fn):
    x = sample()
    with pytest.raises(MemoryFeatureError, match="E-M01"):
        Discard()(fn, x)
    assert x.untyped_storage().nbytes() > 0


def test_parameters_and_buffers_are_refused():
    norm = nn.BatchNorm1d(WIDTH)
    with pytest.raises(MemoryFeatureError, match="E-M01"):
        Discard()(lambda x: norm.weight, sample())

    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3))

        def forward(self, x):
            return x * 2, self.table

    with pytest.raises(MemoryFeatureError, match="E-M01"):
        Discard()(Stored(), sample())


def test_hook_order():
    order = []
    x = sample(dtype=torch.float32)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def region(x):
        order.append("region")
        return torch.sin(x)

    class Consumer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weight):
            ctx.y, ctx.weight = y, weight  # no hook sees an attribute
            return y @ weight

        @staticmethod
        def backward(ctx, grad):
            order.append(f"consumer {ctx.y.untyped_storage().nbytes()}")
            return grad @ ctx.weight.T, ctx.y.T @ grad

    d = Discard()
    y = d(region, x)
    z = Consumer.apply(y, weight)
    d.release(until=z)
    assert y.untyped_storage().nbytes() == 0
    z.sum().backward()
    assert order == ["region", "region", f"consumer {4 * TOKENS * WIDTH}"]
    assert torch.equal(weight.grad, torch.sin(x.detach()).T @ torch.ones(TOKENS, WIDTH))


def test_several_outputs_in_one_storage():
    def chunks(x):
        return torch.chunk(torch.exp(x), 2, dim=-1)

    x = sample(dtype=torch.float32)
    expected = torch.autograd.grad((chunks(x)[0] * chunks(x)[1]).sum(), x)[0]
    d = Discard()
    a, b = d(chunks, x)
    z = a * b
    d.release(until=z)
    assert a.untyped_storage().nbytes() == 0
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], expected)


def test_keyword_arguments_and_other_outputs():
    x = sample(dtype=torch.float32)
    d = Discard()
    y, name, nothing = d(lambda a, *, scale, name: (a * scale, name, None), x, scale=x, name="n")
    z = y.pow(2)
    d.release(until=z)
    assert (name, nothing) == ("n", None)
    (found,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(found, torch.autograd.grad((x * x).pow(2).sum(), x)[0])


def test_chain_restores_in_order():
    def forward(x, discard):
        calls = [Discard(), Discard()]
        y = calls[0](torch.exp, x) if discard else torch.exp(x)
        w = calls[1](torch.sin, y) if discard else torch.sin(y)
        z = w * w
        if discard:
            Discard.chain(calls).release(until=z)
            assert y.untyped_storage().nbytes() == w.untyped_storage().nbytes() == 0
        return z

    x = sample(dtype=torch.float32)
    expected, found = (torch.autograd.grad(forward(x, d).sum(), x)[0] for d in (False, True))
    assert torch.equal(expected, found)


def test_several_triggers():
    x = sample(dtype=torch.float32)

    def forward(discard):
        d = Discard()
        y = d(torch.exp, x) if discard else torch.exp(x)
        one, two = y * y, y.pow(3)
        if discard:
            d.release(until=[one, two])
        return one + two

    expected, found = (torch.autograd.grad(forward(d).sum(), x)[0] for d in (False, True))
    assert torch.equal(expected, found)


def test_retain_graph():
    plain, other = pair()
    x = sample()
    found = []
    for model in (plain, other):
        z = model(x)
        z.sum().backward(retain_graph=True)
        z.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            z.sum().backward()
        found.append([p.grad for p in model.parameters()])
        x.grad = None
    assert all(torch.equal(e, f) for e, f in zip(*found, strict=True))
    assert other.calls == 2


def test_second_order():
    found = []
    for model in pair(act=torch.tanh, dtype=torch.float32):
        x = sample(dtype=torch.float32)
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), model.fc1.weight)[0])
    assert torch.equal(*found)


def test_eval_noop():
    plain, other = pair()
    x = sample()
    expected = grads(plain, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(other(x), plain(x))
    assert all(ref() is None for ref in other.storages)
    found = grads(other, x)  # between evaluations it still works
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


def dropped(x):
    return F.dropout(F.gelu(x), 0.5)


def check_dropout():
    check_equal(act=dropped, steps=2)


def test_dropout_rng():
    check_dropout()


def test_autocast():
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    def act(x):
        return x.float() @ torch.eye(HIDDEN)  # in bf16 under autocast

    check_equal(act=act, dtype=torch.float32, context=context)


def test_generator_registered():
    generator = torch.Generator().manual_seed(7)

    def act(x):
        return x * torch.rand(x.shape, generator=generator).to(x.dtype)

    plain, other = pair(act=act)
    x = sample()
    generator.manual_seed(7)
    expected = grads(plain, x)
    sources = ((generator.get_state, generator.set_state),)
    other.made = lambda: Discard(sources=sources)
    generator.manual_seed(7)
    found = grads(other, x)
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))
    other.made = Discard
    generator.manual_seed(7)
    assert not all(torch.equal(e, f) for e, f in zip(expected, grads(other, x), strict=True))


def test_double_peak():
    """The output comes back by adoption: there are never two of them."""
    _, other = pair(dtype=torch.float32)
    real, seen = other.act, []

    def act(h):
        census.reset_peak()
        seen.append(census.nbytes)
        return real(h)

    with StorageCensus() as census:
        z = other(sample(dtype=torch.float32))
        other.act = act
        z.grad_fn.register_prehook(lambda _: seen.append(census.peak))  # after the restore
        z.backward(torch.ones_like(z))
    before, most = seen[-2:]
    assert most - before == 4 * TOKENS * HIDDEN


def test_nothing_left_without_a_backward():
    _, other = pair()
    gc.disable()
    try:
        z = other(sample())
        del z
        assert all(ref() is None for ref in other.storages)
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    """A checkpoint drops the interior itself; its own second run may discard in it."""
    plain, other = pair()
    x = sample()
    expected = grads(plain, x)
    wrapped = other.forward
    other.forward = lambda x: checkpoint(wrapped, x, use_reentrant=reentrant)
    found = grads(other, x)
    assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


def test_exception_in_forward():
    def broken(x):
        raise RuntimeError("broken")

    d = Discard()
    with pytest.raises(RuntimeError, match="broken"):
        d(broken, sample())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    check_equal()


def test_misuse():
    x = sample(dtype=torch.float32)
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        Discard().release(until=x)
    d = Discard()
    y = d(torch.exp, x)
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        d(torch.exp, x)
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        Discard.chain([d]).release(until=y)
    d = Discard()
    y = d(torch.exp, x)
    with pytest.raises(MemoryFeatureError, match="E-M02"):
        d.release(until=y.detach() * 2)
    with pytest.raises(MemoryFeatureError, match="E-M03"):
        d.release(until=y * 2)
    with pytest.raises(MemoryFeatureError, match="E-M04"):
        torch.func.grad(lambda t: Discard()(torch.exp, t).sum())(x)
    with pytest.raises(ValueError, match="rng"):
        Discard(rng="sometimes")
    with pytest.raises(ValueError, match="autocast"):
        Discard(autocast="maybe")


def test_a_region_that_changes_is_refused():
    for first, second in ((1, 2), (2, 1)):
        times = [second, first]

        def changing(x):
            for _ in range(times.pop()):  # noqa: B023
                x = torch.sin(x)
            return x

        d = Discard()
        z = d(changing, sample()).pow(2)
        d.release(until=z)
        with pytest.raises(MemoryFeatureError, match="E-M03"):
            z.sum().backward()


MUTATIONS = {
    "the random state is not replayed": (
        "ms_memory.recompute.replay:Replay.again",
        "zip(self._states, self._sources, strict=True)", "()",
    ),
    "the bytes do not come back": (
        "ms_memory.recompute.region:Shell.refill", "tensor.data = found.detach()",
        "tensor.data = torch.full_like(found, float('nan'))",
    ),
    "the output is never empty": (
        "ms_memory.recompute.region:Shell.empty", "self.storage.resize_(0)", "pass",
    ),
    "the output comes back at once": (
        "ms_memory.recompute.discard:Discard.release",
        "node.register_prehook(lambda _: region.fill())", "region.fill()",
    ),
    "autocast is not replayed": (
        "ms_memory.recompute.replay:Replay.again", "torch.autocast(**kwargs)",
        "__import__('contextlib').nullcontext()",
    ),
}  # fmt: skip


def check_all():
    test_bytes_exact()
    test_hook_order()
    check_dropout()
    test_autocast()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name):
    by = AssertionError, MemoryFeatureError
    assert_caught(Mutation(name, *MUTATIONS[name]), check_all, by)
