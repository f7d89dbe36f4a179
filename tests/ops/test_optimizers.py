"""The optimizers beside torch's, and what they keep: steps, averages, the count of the warm-up."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ms_ops
from ms_ops.optim import portable
from support.mutation import Mutation, assert_caught

SHAPES = ((4, 3), (5,), (2, 0), ())
RATES = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
AVERAGED = "ms_ops.optim.averaged:FusedEmaAdamW"


def parameters(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def set_gradients(params, seed):
    for p, g in zip(params, parameters(seed), strict=True):
        p.grad = g.detach().to(p.dtype)


def train(optimizer, params, steps, start=0):
    for number in range(start, start + steps):
        set_gradients(params, 100 + number)
        optimizer.step()


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-13, atol=1e-13)


def equal(mine, theirs):
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


FORMS = {
    "decoupled": ({}, torch.optim.AdamW, {}),
    "penalty": ({"adam_w_mode": False}, torch.optim.Adam, {}),
    "amsgrad": ({"amsgrad": True}, torch.optim.AdamW, {"amsgrad": True}),
    "maximize": ({"maximize": True}, torch.optim.AdamW, {"maximize": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_go_to_torch_and_back(form):
    """10 steps here, 10 there and 10 here again follow 30 of torch's."""
    mine, kind, theirs = FORMS[form]
    alone, going = parameters(), parameters()
    reference = kind(alone, foreach=False, **RATES, **theirs)
    ours = ms_ops.FusedAdamW(going, **RATES, **mine)
    train(reference, alone, 30)
    train(ours, going, 10)
    middle = kind(going, foreach=False, **RATES, **theirs)
    middle.load_state_dict(ours.state_dict())
    train(middle, going, 10, 10)
    back = ms_ops.FusedAdamW(going)
    back.load_state_dict(middle.state_dict())
    train(back, going, 10, 20)
    close(going, alone)


def averages(params, steps, decay, warm=True):
    """AdamW of torch and the average as the formula says, one number after the other."""
    optimizer = torch.optim.AdamW(params, foreach=False, **RATES)
    emas = [p.detach().clone() for p in params]
    for number in range(steps):
        train(optimizer, params, 1, number)
        n = number + 1
        d = min(decay, (1 + n) / (10 + n)) if warm else decay
        emas = [d * e + (1 - d) * p.detach() for e, p in zip(emas, params, strict=True)]
    return emas


def emas_of(optimizer, params):
    return [optimizer.state[p]["ema_params"] for p in params]


@pytest.mark.parametrize(("decay", "warm"), [(0.5, True), (0.9999, True), (0.9, False)])
def test_averages_of_twenty_steps(decay, warm):
    mine, theirs = parameters(), parameters()
    optimizer = ms_ops.FusedEmaAdamW(mine, ema_decay=decay, use_num_updates=warm, **RATES)
    train(optimizer, mine, 20)
    wanted = averages(theirs, 20, decay, warm)
    close(mine, theirs)
    close(emas_of(optimizer, mine), wanted)


def saved(optimizer):
    """A state dict that went through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resume():
    """Six steps in one go, and three, a state dict, and three: the same bits."""
    whole, parts = (parameters(dtype=torch.float32) for _ in range(2))
    straight = ms_ops.FusedEmaAdamW(whole, **RATES)
    train(straight, whole, 6)
    first = ms_ops.FusedEmaAdamW(parts, **RATES)
    train(first, parts, 3)
    resumed = ms_ops.FusedEmaAdamW(parts, **RATES)
    resumed.load_state_dict(saved(first))
    train(resumed, parts, 3, 3)
    assert resumed.decay(resumed.param_groups[0]) == 7 / 16
    assert equal(parts, whole)
    assert equal(emas_of(resumed, parts), emas_of(straight, whole))


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation(
            "num_updates is not restored",
            f"{AVERAGED}.__setstate__",
            "self._check(group)",
            'self._check(group); group["num_updates"] = 0',
        ),
        Mutation("decay off by one", f"{AVERAGED}.decay", "(1 + n) / (10 + n)", "n / (9 + n)"),
        Mutation("update not counted", f"{AVERAGED}._begin", "] += 1", "] += 0"),
        Mutation(
            "averages start anew", f"{AVERAGED}._complete", '"ema_params" not in state', "True"
        ),
    ],
    ids=lambda m: m.name,
)
def test_resume_is_exact_and_its_mutants_are_caught(mutation):
    assert_caught(mutation, check_resume)


def test_a_parameter_counts_its_own_steps():
    """A group that joins late, and a parameter whose gradient comes late, start at step 1."""
    mine, theirs = parameters(), parameters()
    ours = ms_ops.FusedEmaAdamW(mine[:2], **RATES)
    reference = torch.optim.AdamW(theirs[:2], foreach=False, **RATES)
    for number in range(12):
        if number == 4:
            ours.add_param_group({"params": mine[2:]})
            reference.add_param_group({"params": theirs[2:]})
        for params in (mine, theirs):
            set_gradients(params, 300 + number)
            params[1].grad = params[1].grad if number >= 2 else None
        ours.step()
        reference.step()
    close(mine, theirs)
    assert [ours.state[p]["step"].item() for p in mine] == [12, 10, 8, 8]
    assert [group["num_updates"] for group in ours.param_groups] == [12, 8]


def test_averages_in_place_of_the_weights_and_back():
    params = parameters(dtype=torch.float32)
    optimizer = ms_ops.FusedEmaAdamW(params, **RATES)
    train(optimizer, params, 3)
    before = [p.detach().clone() for p in params]

    def interrupted():
        with optimizer.averaged():
            assert equal(params, emas_of(optimizer, params))
            with pytest.raises(RuntimeError, match="the weights are stored away"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="stored already"):
                optimizer.store()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert equal(params, before)
    with pytest.raises(RuntimeError, match="nothing is stored"):
        optimizer.restore()
    low = [p.detach().bfloat16() for p in params]
    optimizer.copy_to(low)
    assert equal(low, [e.bfloat16() for e in emas_of(optimizer, params)])
    with pytest.raises(ValueError, match="parameters: got 1 tensors of other shapes, need 4"):
        optimizer.copy_to(low[:1])


def test_averages_start_again_at_the_weights():
    params = parameters()
    optimizer = ms_ops.FusedEmaAdamW(params, **RATES)
    train(optimizer, params, 3)
    optimizer.restart()
    assert equal(emas_of(optimizer, params), params)
    train(optimizer, params, 1, 3)
    assert optimizer.decay(optimizer.param_groups[0]) == 2 / 11


def test_a_parameter_that_never_moved_is_its_own_average():
    params = parameters()
    optimizer = ms_ops.FusedEmaAdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    before = [p.detach().clone() for p in params[1:]]
    with optimizer.averaged():
        assert equal(params[1:], before)
    optimizer.create_states()
    assert equal(emas_of(optimizer, params)[1:], before)
    assert optimizer.state[params[1]]["step"].item() == 0


def test_states_of_other_adams():
    """Without averages, with the step in the group, or with one step tensor for all."""
    params = parameters()
    other = torch.optim.AdamW(params, **RATES)
    train(other, params, 3)
    state = other.state_dict()
    shared = torch.tensor(3.0)
    for entry in state["state"].values():
        entry["step"] = shared
    optimizer = ms_ops.FusedEmaAdamW(params)
    optimizer.load_state_dict(state)
    assert equal(emas_of(optimizer, params), params)
    train(optimizer, params, 1)
    assert {optimizer.state[p]["step"].item() for p in params} == {4.0}
    state = other.state_dict()
    state["param_groups"][0]["step"] = 7
    for entry in state["state"].values():
        del entry["step"]
    optimizer.load_state_dict(state)
    assert {optimizer.state[p]["step"].item() for p in params} == {7.0}


def test_a_copy_goes_on_like_the_optimizer():
    params = parameters()
    optimizer = ms_ops.FusedEmaAdamW(params, ema_decay=0.3, bias_correction=False, **RATES)
    train(optimizer, params, 2)
    twin, others = copy.deepcopy((optimizer, params))
    assert (twin.ema_decay, twin.bias_correction) == (0.3, False)
    train(optimizer, params, 1, 2)
    train(twin, others, 1, 2)
    assert equal(emas_of(twin, others), emas_of(optimizer, params))


def test_taking_over_a_torch_optimizer_keeps_groups_and_state():
    params, theirs = parameters(), parameters()
    plain, reference = (torch.optim.Adam(p, foreach=False, **RATES) for p in (params, theirs))
    train(plain, params, 2)
    optimizer = ms_ops.FusedAdamW.take_over(plain)
    assert optimizer.param_groups is plain.param_groups
    train(optimizer, params, 3, 2)
    train(reference, theirs, 5)
    close(params, theirs)


def test_scheduler_closure_and_gradients():
    params = parameters()
    optimizer = ms_ops.FusedAdamW(params, lr=0.1, set_grad_none=False)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert optimizer.step(closure) < first
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.zero_grad()
    assert all(p.grad.count_nonzero() == 0 for p in params)
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("FusedEmaAdamW", {"ema_decay": 1.1}, "ema_decay: got 1.1, need a number in .0, 1."),
        ("FusedEmaAdamW", {"ema_decay": -0.1}, "ema_decay: got -0.1"),
        ("FusedEmaAdamW", {"ema_decay": float("nan")}, "ema_decay: got nan"),
        ("FusedEmaAdamW", {"amsgrad": True}, "amsgrad: got True, need amsgrad=False"),
        ("FusedEmaAdamW", {"maximize": True}, "maximize: got True, need maximize=False"),
        ("FusedAdamW", {"betas": (0.9, 1.0)}, "FusedAdamW: beta2: got 1.0"),
        ("FusedAdamW", {"lr": -1.0}, "FusedAdamW: lr: got -1.0"),
    ],
)
def test_values_that_cannot_be(kind, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(ms_ops, kind)(parameters(), **options)


def test_what_cannot_be_averaged_is_refused_when_it_comes_later():
    params = parameters()
    optimizer = ms_ops.FusedEmaAdamW(params[:1])
    with pytest.raises(ValueError, match="maximize: got True"):
        optimizer.add_param_group({"params": params[1:], "maximize": True})
    assert len(optimizer.param_groups) == 1
    amsgrad = torch.optim.AdamW(params[:1], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad: got True"):
        ms_ops.FusedEmaAdamW(params[:1]).load_state_dict(amsgrad.state_dict())


def test_low_precision_and_sparse_gradients_are_refused():
    with pytest.raises(TypeError, match=r"FusedAdamW: params: got torch.bfloat16, need one of"):
        ms_ops.FusedAdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(TypeError, match="a sparse gradient, need dense"):
        ms_ops.FusedAdamW([weight]).step()


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each operator reads and writes; scalars in tensors aside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [a for a in tree_leaves((args, kwargs)) if torch.is_tensor(a)]
        names = [a.name for a in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        # The schema of the fused step marks gradients, which it only unscales, as written.
        written = [
            given.get(a.name)
            for a in func._schema.arguments
            if a.alias_info and a.alias_info.is_write and a.name != "grads"
        ]
        fresh = [] if any(a is not None for a in written) else tree_leaves(out)
        moved = [*read, *tree_leaves(written), *fresh]
        self.bytes += sum(t.numel() * t.itemsize for t in moved if torch.is_tensor(t) and t.dim())
        return out


def test_bytes_of_one_step():
    """28 and 40 bytes a weight: each tensor once in, once out, and the average's pass."""
    size, options = 1000, (0.9, 0.999, 1e-8, 0.1, 1, True)
    step = torch.tensor(3.0)

    def moved(run, count):
        lists = [[torch.ones(size)] for _ in range(count)]
        with Traffic() as traffic:
            run(*lists)
        return traffic.bytes / size

    assert moved(lambda *lists: portable.adamw(*lists, step, [], 1e-3, *options), 4) == 28
    assert moved(lambda *lists: portable.ema_adamw(*lists, step, 1e-3, 0.9, *options), 5) == 40
    weight = torch.nn.Parameter(torch.ones(size))
    plain = torch.optim.AdamW([weight], foreach=False)
    weight.grad = torch.ones(size)
    plain.step()
    assert moved(plain.step, 0) > 70
