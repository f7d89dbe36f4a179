"""The level-0 plan on the real Megatron: applied in either order, undone to the last attribute."""

import sys

import pytest

from mindspeed.patching.source import installed_source
from support.ranks import run_ranks

pytestmark = pytest.mark.skipif(installed_source() is None, reason="megatron-core is not installed")


def load():
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.tensor_parallel  # noqa: F401


def watched(name):
    others = ("torch.cuda", "torch.distributed")
    return name.split(".")[0] == "megatron" or name == "torch" or name.startswith(others)


def snapshot():
    """Identity of every attribute of the watched modules and of the classes that they define."""
    found = {}
    for name, module in list(sys.modules.items()):
        if watched(name):
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    found.update(
                        ((name, key, member), id(held))
                        for member, held in vars(value).items()
                        if not member.startswith("__") or member in ("__init__", "__new__")
                    )
    return found


def differences(before, after):
    return sorted(key for key in {*before, *after} if before.get(key) != after.get(key))


def state(handle):
    """What became of each target, and the module of what stands there now."""
    rows = []
    for row in handle.report().rows:
        module, _, path = row.target.partition(":")
        owner = vars(sys.modules[module]).get(path.split(".")[0]) if module in sys.modules else None
        rows.append((row.target, row.status, getattr(owner, "__module__", None)))
    return rows


def import_first(rank, world_size):
    import torch

    import mindspeed

    load()
    plan = mindspeed.plan(level=0, device="cpu")
    mindspeed.apply(plan).undo()  # once, so that lazy parts of torch are loaded before the snapshot
    before, operators, finders = snapshot(), set(vars(torch.ops)), list(sys.meta_path)
    handle = mindspeed.apply(plan)
    changed = differences(before, snapshot())
    applied = [row for row in handle.report().rows if row.status == "applied" and ":" in row.target]
    assert len(changed) >= len(applied) >= 10
    assert all(key[0].startswith("megatron.") for key in changed), changed
    rows = state(handle)
    handle.undo()
    assert differences(before, snapshot()) == []
    assert set(vars(torch.ops)) == operators
    assert sys.meta_path == finders
    return rows


def apply_first(rank, world_size):
    import mindspeed
    import mindspeed.device

    mindspeed.device.install("cpu")
    handle = mindspeed.apply(mindspeed.plan(level=0, device="cpu"))
    assert not [name for name in sys.modules if name.startswith("megatron")]
    load()
    return state(handle)


def load_every_value(rank, world_size):
    import argparse

    from mindspeed.features import load_features
    from mindspeed.patching.slot import load as load_object

    count = 0
    for feature in load_features():
        if feature.advise:
            assert isinstance(load_object(feature.advise)(argparse.Namespace()), str)
        for patch in feature.patches:
            load_object(patch.value)
            assert patch.probe is None or callable(load_object(patch.probe))
            count += 1
    return count


def test_megatron_comes_back_to_the_last_attribute_and_the_order_makes_no_difference():
    (loaded,) = run_ranks(import_first, 1, preload="megatron", timeout=300)
    (fresh,) = run_ranks(apply_first, 1, timeout=300)
    assert loaded == fresh
    assert "applied" in {status for _, status, _ in loaded}


def test_every_value_and_every_probe_can_be_loaded():
    assert run_ranks(load_every_value, 1, preload="megatron", timeout=300)[0] > 20
