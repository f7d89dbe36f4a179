"""Level 0 leaves no trace: what was changed comes back, what others see never changed."""

import inspect
import pkgutil
import sys

import pytest

from support.ranks import COMPILED, run_ranks

pytestmark = pytest.mark.megatron014

SEEN = ("megatron", "torch", "torch.cuda", "torch.distributed", "importlib.metadata")


def import_all():
    import importlib
    import warnings

    import megatron.core

    warnings.simplefilter("ignore")
    for info in pkgutil.walk_packages(megatron.core.__path__, "megatron.core.", lambda name: None):
        try:
            importlib.import_module(info.name)
        except Exception:
            continue  # needs a package that is not here


def snapshot():
    """Identity of every attribute of every module of interest, and of the classes in them."""
    facts = {}
    for name, module in list(sys.modules.items()):
        if name not in SEEN and not name.startswith("megatron."):
            continue
        for attribute, value in list(vars(module).items()):
            facts[name, attribute] = id(value)
            if name.startswith("megatron.") and inspect.isclass(value):
                facts.update({(name, attribute, k): id(v) for k, v in vars(value).items()})
    return facts


def apply_and_undo(rank, world_size, level):
    import torch

    import mindspeed

    import_all()
    with mindspeed.activate({}, level=level):
        pass  # first time: lazy imports of ours and of torch's happen here
    ops, classes = set(vars(torch.ops)), set(vars(torch.classes))
    before = snapshot()
    handle = mindspeed.activate({}, level=level)
    changed = {key for key, value in snapshot().items() if before.get(key) != value}
    applied = [row.target for row in handle.report().rows if row.status == "applied"]
    stale = handle.report().stale
    handle.undo()
    after = snapshot()
    left = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    other = (set(vars(torch.ops)) - ops, set(vars(torch.classes)) - classes)
    return sorted(changed), applied, stale, left, other, len(before)


def test_every_attribute_is_the_same_object_after_undo():
    changed, applied, stale, left, other, seen = run_ranks(
        apply_and_undo, 1, 0, preload="megatron", timeout=180
    )[0]
    assert seen > 10_000
    assert left == set()
    assert other == (set(), set())
    assert len(applied) >= 14
    assert not stale, stale
    modules = {key[0] for key in changed}
    assert all(name.startswith("megatron.") for name in modules)
    assert "megatron.core.tensor_parallel.mappings" in modules


def torch_seen_from_outside(rank, world_size):
    import torch

    from mindspeed.train.config import TrainConfig
    from mindspeed.train.trainer import Trainer

    functions = {n: id(v) for m in (torch, torch.cuda) for n, v in vars(m).items()}
    with Trainer(TrainConfig.of(num_layers=1, hidden_size=16, seq_length=8)) as trainer:
        trainer.run(1)
        available = torch.cuda.is_available()
        now = {n: id(v) for m in (torch, torch.cuda) for n, v in vars(m).items()}
        compiled = torch.compile(lambda x: x.sin() * 2, fullgraph=True, backend="aot_eager")
        x = torch.ones(3)
        equal = torch.equal(compiled(x), x.sin() * 2)
    return available, {name for name in functions if functions[name] != now[name]}, equal


def test_other_code_sees_honest_cuda_while_megatron_trains():
    available, changed, equal = run_ranks(
        torch_seen_from_outside, 1, preload="megatron", env=COMPILED
    )[0]
    assert available is False
    assert changed == set()
    assert equal


def never_called(rank, world_size):
    import mindspeed
    from mindspeed.train.config import TrainConfig
    from mindspeed.train.trainer import Trainer

    config = TrainConfig.of(num_layers=1, hidden_size=16, seq_length=8)
    with mindspeed.activate(config.flat(), level=0) as handle, Trainer(config) as trainer:
        trainer.run(1)
        return handle.calls(), handle.never_called()


def test_a_patch_that_is_never_called_is_known_after_the_first_step():
    calls, never = run_ranks(never_called, 1, preload="megatron")[0]
    norm = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"
    fork = "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork"
    assert calls[norm] >= 3
    assert norm not in never
    assert "megatron.core.tensor_parallel.mappings:_gather_along_first_dim" in never
    assert fork in calls


def test_level_0_is_small_and_every_patch_has_a_reason():
    import mindspeed

    for version in ("0.14.0", "0.16.1"):
        plan = mindspeed.plan(level=0, device="cpu", megatron=version)
        patches = [step.patch for step in plan.acting]
        assert 0 < len(patches) <= 25
        assert all(len(patch.reason.split()) > 5 for patch in patches)
        assert not any(patch.target.startswith("torch") for patch in patches)
