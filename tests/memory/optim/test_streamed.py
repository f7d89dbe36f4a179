"""State on the host: the inner optimizer's bits, exact bytes on the device, no copy too few."""

import itertools

import pytest
import torch

from ms_memory import device
from ms_memory.errors import MemoryFeatureError
from ms_memory.optim import Streamed, store
from ms_memory.optim.bins import bins, peak

SHAPES = ((7, 9), (33,), (), (0, 5), (4, 4, 2), (50,))
NUMELS = (63, 33, 1, 0, 32, 50)


class Lion(torch.optim.Optimizer):
    """Sign of an interpolation; counts its steps in the group, as some optimizers do."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_((m * 0.9 + p.grad * 0.1).sign() * group["lr"] / group["count"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


INNER = {
    "AdamW": (lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1), 2),
    "amsgrad": (lambda ps: torch.optim.Adam(ps, 1e-2, amsgrad=True), 3),
    "SGD-momentum": (lambda ps: torch.optim.SGD(ps, 1e-2, momentum=0.9, nesterov=True), 1),
    "Lion-like": (Lion, 1),
    "fused": (lambda ps: torch.optim.AdamW(ps, 1e-2, fused=True), 2),
}


def params(dtype=torch.float32, seed=3):
    torch.manual_seed(seed)
    return [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]


def groups_of(found):
    return [{"params": found[:3], "lr": 5e-3}, {"params": found[3:]}]


def train(optimizer, found, steps, first=0, skip=()):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(found):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if (step, i) in skip else grad
        optimizer.step()


def equal(mine, other):
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def equal_states(mine, other):
    assert mine.keys() == other.keys()
    for number, state in mine.items():
        assert state.keys() == other[number].keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[number][key]), (number, key)
                assert value.dtype is other[number][key].dtype


def pair(make, schedule="late", dtype=torch.float32, **options):
    plain, moved = params(dtype), params(dtype)
    sim = device.sim(schedule=schedule)
    streamed = Streamed(make(groups_of(moved)), device=sim, **options)
    return make(groups_of(plain)), plain, streamed, moved, sim


@pytest.mark.parametrize(("make", "_tensors"), INNER.values(), ids=INNER)
def test_bitequal_inner(make, _tensors):
    for groups, double in ((1, True), (3, True), (16, False)):
        inner, plain, streamed, moved, _ = pair(make, groups=groups, double_buffer=double)
        train(inner, plain, 10)
        train(streamed, moved, 10)
        equal(moved, plain)
        streamed.sync()
        equal_states(streamed.state_dict()["state"], inner.state_dict()["state"])
        assert streamed.state_dict()["param_groups"] == inner.state_dict()["param_groups"]


def test_fp32_params():
    """Parameters that need no master beside those that have bf16 copies elsewhere."""
    inner, plain, streamed, moved, _ = pair(INNER["AdamW"][0], dtype=torch.bfloat16, groups=4)
    extra = [torch.randn(5), torch.randn(3, 2)]
    for optimizer, found in ((inner, plain), (streamed, moved)):
        own = [t.clone().requires_grad_() for t in extra]
        optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        found += own
        train(optimizer, found, 10)
    equal(moved, plain)
    assert len(streamed.inner.param_groups) == 3


def test_none_grads():
    skip = {(0, 0), (3, 1), (3, 4), (5, 0), *((6, i) for i in range(len(SHAPES)))}
    for double in (True, False):
        inner, plain, streamed, moved, sim = pair(INNER["AdamW"][0], groups=4, double_buffer=double)
        train(inner, plain, 8, skip=skip)
        train(streamed, moved, 8, skip=skip)
        equal(moved, plain)
        sim.reset_peak()
        for p in moved:
            p.grad = None
        streamed.step()
        assert sim.stats().peak == 0  # nothing moves without a gradient
    equal_states(streamed.state_dict()["state"], inner.state_dict()["state"])


@pytest.mark.parametrize(("make", "tensors"), INNER.values(), ids=INNER)
def test_peak_formula(make, tensors):
    for groups, double in itertools.product((1, 2, 4, 16), (True, False)):
        _, _, streamed, moved, sim = pair(make, groups=groups, double_buffer=double)
        train(streamed, moved, 1)
        sim.reset_peak()
        train(streamed, moved, 1, first=1)
        parts = [sum(NUMELS[i] for i in part) for part in bins(NUMELS, groups)]
        assert max(parts) <= max(*NUMELS, -(-sum(NUMELS) // groups))
        if double:
            most = max(a + b for a, b in zip(parts, [*parts[1:], 0], strict=True))
        else:
            most = max(parts)
        assert sim.stats().peak == streamed.peak_bytes() == 4 * tensors * most
        assert sim.stats().allocated == 0
        assert sim.stats().pinned == streamed.host_nbytes() == 4 * tensors * sum(NUMELS)


def test_bins_and_peak():
    assert bins((4, 4, 4, 4), 2) == [[0, 1], [2, 3]]
    assert bins((9, 1, 1, 1), 4) == [[0], [1, 2, 3]]
    assert bins((1, 9, 1), 11) == [[0], [1], [2]]
    assert bins((), 3) == []
    assert bins((0, 0), 3) == [[0, 1]]
    assert peak([3, 5, 4], True) == 9
    assert peak([3, 5, 4], False) == 5
    assert peak([], True) == 0


def test_state_dict_roundtrip():
    make = INNER["amsgrad"][0]
    inner, plain, streamed, moved, sim = pair(make, groups=3)
    train(inner, plain, 4)
    train(streamed, moved, 4)
    before = sim.stats()
    kept = streamed.state_dict()
    assert kept["state"][0]["exp_avg"] is streamed.state[moved[0]]["exp_avg"]
    copied = {n: {k: t.clone() for k, t in s.items()} for n, s in kept["state"].items()}
    kept = {"state": copied, "param_groups": kept["param_groups"]}
    assert sim.stats() == before  # nothing went to the device
    # Into another Streamed, the plain optimizer, and from it.
    _, _, other, theirs, sim = pair(make, groups=1)
    other.load_state_dict(kept)
    assert sim.stats().peak == 0
    plainly = make(groups_of(mine := params()))
    plainly.load_state_dict(kept)
    _, _, back, found, _ = pair(make, groups=2)
    back.load_state_dict(inner.state_dict())
    for values in (theirs, mine, found):
        with torch.no_grad():
            for p, q in zip(values, plain, strict=True):
                p.copy_(q)
    train(inner, plain, 3, first=4)
    for optimizer, values in ((other, theirs), (plainly, mine), (back, found), (streamed, moved)):
        train(optimizer, values, 3, first=4)
        equal(values, plain)
    with pytest.raises(ValueError, match="got groups of"):
        other.load_state_dict(torch.optim.Adam(params(), amsgrad=True).state_dict())


def test_schedules():
    make = INNER["AdamW"][0]
    inner, plain, *_ = pair(make)
    train(inner, plain, 4)
    for schedule in ("early", "late", *range(50)):
        _, _, streamed, moved, _ = pair(
            make, schedule, groups=4, double_buffer=schedule not in range(0, 50, 3)
        )
        train(streamed, moved, 4)
        equal(moved, plain)
        streamed.sync()
        equal_states(streamed.state_dict()["state"], inner.state_dict()["state"])


def drop_at_once(self):
    for p in self._emptied:
        self.device.empty_storage(p)
    self._emptied, self._leaving = [], []


class Ready:
    def wait(self):
        """A wait that somebody forgot."""


def forget_wait(self, params, state, fetch=store.Store.fetch):
    return None if fetch(self, params, state) is None else Ready()


@pytest.mark.parametrize(("name", "fault"), [("let_go", drop_at_once), ("fetch", forget_wait)])
def test_seeded_bugs_are_caught(monkeypatch, name, fault):
    make = INNER["AdamW"][0]
    inner, plain, *_ = pair(make)
    train(inner, plain, 4)
    monkeypatch.setattr(store.Store, name, fault)

    def right(schedule):
        _, _, streamed, moved, _ = pair(make, schedule, groups=4)
        train(streamed, moved, 4)
        return all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))

    assert not right("late")
    assert not all(right(seed) for seed in range(8))
    assert right("early")


def test_masters_stay_on_the_host_too():
    weights = [p.detach().to(torch.bfloat16) for p in params()]
    masters = [w.float().requires_grad_() for w in weights]
    plain = [m.detach().clone().requires_grad_() for m in masters]
    inner = torch.optim.AdamW(plain, 1e-2)
    where = {id(m): w for m, w in zip(masters, weights, strict=True)}

    def publish(updated):
        for m in updated:
            where[id(m)].copy_(m)

    sim = device.sim()
    adamw = torch.optim.AdamW(masters, 1e-2)
    streamed = Streamed(adamw, groups=3, masters=publish, device=sim)
    assert all(m.untyped_storage().nbytes() == 0 for m in masters)
    skip = {(1, 0), (2, 5)}
    train(inner, plain, 5, skip=skip)
    train(streamed, masters, 5, skip=skip)
    equal(weights, [p.detach().to(torch.bfloat16) for p in plain])
    equal(streamed.masters_on_host(), [p.detach() for p in plain])
    assert streamed.host_nbytes() == 12 * sum(NUMELS)
    sim.reset_peak()
    train(streamed, masters, 1, first=5)
    assert sim.stats().peak == streamed.peak_bytes() <= 12 * 2 * max(*NUMELS, 60)
    assert sim.stats().allocated == 0
    train(inner, plain, 1, first=5)
    streamed.residency("device")
    equal([m.detach() for m in masters], [p.detach() for p in plain])
    half = [torch.zeros(8)[:4].requires_grad_()]
    with pytest.raises(ValueError, match="inside a larger storage"):
        Streamed(torch.optim.SGD(half), masters=publish, device=sim)


def test_residency_closure_and_scheduler():
    inner, plain, streamed, moved, sim = pair(INNER["AdamW"][0], groups=3)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (inner, streamed)]
    for step in range(6):
        if step == 2:
            streamed.residency("device")
            assert streamed.host_nbytes() == 0
            assert sim.stats().allocated == 8 * sum(NUMELS)
        if step == 4:
            streamed.residency("host")
            assert sim.stats().allocated == 0
        for optimizer, found in ((inner, plain), (streamed, moved)):
            train(optimizer, found, 1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    equal(moved, plain)
    assert streamed.param_groups[0]["lr"] == 5e-3 * 0.5**6
    calls = []
    assert streamed.step(lambda: calls.append(torch.is_grad_enabled()) or 3.5) == 3.5
    assert calls == [True]


def test_an_exception_in_the_inner_step_keeps_all_state():
    inner, plain, streamed, moved, _ = pair(INNER["AdamW"][0], groups=3)
    train(inner, plain, 2)
    train(streamed, moved, 2)
    handle = streamed.inner.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(streamed, moved, 1, first=2)
    handle.remove()
    assert [len(g["params"]) for g in streamed.param_groups] == [3, 3]
    train(inner, plain, 2, first=2)
    train(streamed, moved, 2, first=2)
    equal(moved, plain)


def test_out_of_memory_keeps_all_state():
    def step(optimizer, found):
        for p in found:
            p.grad = torch.ones(8)
        optimizer.step()

    mine, plain = ([torch.zeros(8).requires_grad_() for _ in range(4)] for _ in range(2))
    sim = device.sim(capacity=2 * 32 + 3 * 32)  # two masters, not all of their four moments
    adamw, inner = torch.optim.AdamW(mine), torch.optim.AdamW(plain)
    streamed = Streamed(adamw, groups=2, double_buffer=False, masters=len, device=sim)
    step(streamed, mine)
    with pytest.raises(device.SimOutOfMemoryError):
        step(streamed, mine)
    assert sim.stats().allocated == 0
    sim.capacity = None
    for optimizer, found in ((inner, plain), (streamed, mine), (inner, plain)):
        step(optimizer, found)
    equal(streamed.masters_on_host(), [p.detach() for p in plain])


def test_what_is_refused():
    found = params()
    adamw = torch.optim.AdamW(found)
    with pytest.raises(RuntimeError, match="frees nothing here"):
        Streamed(adamw)
    with pytest.raises(ValueError, match="groups: got 0"):
        Streamed(adamw, groups=0, device=device.sim())
    with pytest.raises(TypeError, match="LBFGS"):
        Streamed(torch.optim.LBFGS(found), device=device.sim())
    with pytest.raises(MemoryFeatureError, match=r"E-M32.*exceed 100"):
        train(Streamed(adamw, host_bytes=100, device=device.sim()), found, 1)
    with pytest.raises(ValueError, match="residency: got 'disk'"):
        Streamed(torch.optim.AdamW(params()), device=device.sim()).residency("disk")


def test_keys_choose_what_moves():
    _, _, streamed, moved, _ = pair(INNER["AdamW"][0], keys=["exp_avg_sq"])
    train(streamed, moved, 2)
    assert streamed.host_nbytes() == 4 * sum(NUMELS)
