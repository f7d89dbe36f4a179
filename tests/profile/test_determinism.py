"""Determinism: equal runs, exact restoration, operators named."""

import os
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ms_profile.determinism import ENVIRONMENT, deterministic
from support.mutation import Mutation, assert_caught
from support.ranks import run_ranks


def train(seed=7):
    """Ten steps with dropout and a shuffled batch; the last loss and every weight."""
    with deterministic(seed):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.GELU())
        for _ in range(10):
            x = torch.randn(4, 8) * random.random() + float(np.random.rand())
            loss = model(x).square().mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    return [loss.detach(), *(p.detach().clone() for p in model.parameters())]


def check_two_runs_are_equal():
    for one, two in zip(train(), train(), strict=True):
        assert torch.equal(one, two)


def test_two_runs_are_equal():
    check_two_runs_are_equal()
    assert not torch.equal(train(7)[0], train(8)[0])


@pytest.mark.parametrize(
    "dropped",
    ["    random.seed(seed)", "    torch.manual_seed(seed)", "        numpy.random.seed(seed)"],
)
def test_a_dropped_seed_is_caught(dropped):
    # The restoration on exit would hide it: a second run would start from the same state.
    target = "ms_profile.determinism:_random_states"
    gone = dropped.replace(dropped.strip(), "None")
    assert_caught(Mutation("no seed", target, f"\n{dropped}", f"\n{gone}"), moved_on_and_equal)


def moved_on_and_equal():
    one = train()
    random.random(), np.random.rand(), torch.rand(1)
    for a, b in zip(one, train(), strict=True):
        assert torch.equal(a, b)


def settings():
    return {
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "filters": list(warnings.filters),
        "show": warnings.showwarning,
    }


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(before, fails, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        state = settings()
        expected = pytest.raises(KeyError) if fails else nullcontext()
        with expected, deterministic(3, unable="report") as record:
            torch.rand(1), random.random(), np.random.rand()
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.deterministic
            assert not torch.backends.cudnn.benchmark
            assert os.environ["HCCL_DETERMINISTIC"] == "true"
            assert os.environ["NCCL_ALGO"] == "Tree"  # a choice of the user's that serves
            if fails:
                raise KeyError("a step that fails")
        assert settings() == state
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(record.variables) == set(ENVIRONMENT) - {"NCCL_ALGO"}
    assert record.as_dict()["seed"] == 3


def unable():
    x = torch.zeros(4)
    return x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_operators_that_cannot_comply_are_named_once():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn("before", stacklevel=1)
        with deterministic(unable="report") as record:
            for _ in range(3):
                unable()
    assert record.operators == ("put_",)
    assert record.as_dict()["operators"] == ["put_"]


def test_other_warnings_pass():
    with deterministic(unable="report"), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)


def test_by_default_such_an_operator_is_an_error():
    with deterministic() as record, pytest.raises(RuntimeError, match="put_ does not have"):
        unable()
    assert record.operators == ()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"seed": -1}, "seed must be"), ({"seed": 2**32}, "seed"), ({"unable": "x"}, "unable must")],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text), deterministic(**arguments):
        pass


def late(rank, world_size, folder):
    def join():
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    with deterministic(5):
        join()
        # In time, and again inside: nothing has to change any more.
        with deterministic(5) as record:
            assert not record.variables
        x = torch.randn(3)
        dist.all_reduce(x)
    before = settings()
    with pytest.raises(RuntimeError, match=r"comes too late.*HCCL_DETERMINISTIC=true"):
        deterministic(5).__enter__()
    assert settings() == before
    dist.destroy_process_group()
    return x


def test_with_a_group_it_is_in_time_or_an_error(tmp_path):
    one, two = run_ranks(late, 2, str(tmp_path), backend=None)
    assert torch.equal(one, two)
