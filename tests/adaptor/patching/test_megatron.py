"""The level-0 plan on the real Megatron: applied in either order, undone to the last attribute."""

import sys

import pytest

from mindspeed.patching.source import installed_source, installed_version
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


ARGUMENTS = """
def add_megatron_arguments({}): return "theirs"
def validate_args(args, defaults={{}}): pass
"""


def find_training_later(rank, world_size, folder):
    """A plan made before the checkout is on the path still reaches `megatron.training`."""
    import importlib

    import mindspeed
    from mindspeed.patching.errors import PatchError

    name = "megatron.training.arguments"
    plan = mindspeed.plan(level=0, device="cpu")
    wanted = {s.patch.path: s.status for s in plan.steps if s.patch.module == name}
    with mindspeed.apply(plan) as handle:
        sys.path.append(folder)
        try:
            arguments = importlib.import_module(name)
        except PatchError as error:
            return wanted, str(error)
        status = {r.target: r.status for r in handle.report().rows}
        assert hasattr(arguments.add_megatron_arguments, "__wrapped__")
        assert mindspeed.plan(level=0, device="cpu").digest == plan.digest
        return wanted, status[f"{name}:add_megatron_arguments"]


@pytest.mark.skipif(installed_version(installed_source()) != "0.16.1", reason="needs 0.16.1")
@pytest.mark.parametrize(
    ("parameter", "outcome"),
    [("parser", "applied"), ("parser, more", "add_megatron_arguments differs")],
)
def test_a_part_that_is_found_later_is_checked_and_patched(tmp_path, parameter, outcome):
    folder = tmp_path / "megatron" / "training"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "yaml_arguments.py").write_text("def validate_yaml(args, defaults={}): pass")
    (folder / "checkpointing.py").write_text("def check_checkpoint_args(checkpoint_args): pass")
    (folder / "arguments.py").write_text(ARGUMENTS.format(parameter))
    ((statuses, found),) = run_ranks(find_training_later, 1, str(tmp_path), preload="megatron")
    assert set(statuses.values()) == {"absent"}
    assert outcome in found


def test_every_value_and_every_probe_can_be_loaded():
    assert run_ranks(load_every_value, 1, preload="megatron", timeout=300)[0] > 20
