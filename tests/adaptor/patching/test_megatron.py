"""The level-0 plan on the real Megatron: applied in any order, undone to the last attribute."""

import subprocess
import sys

import pytest

from mindspeed.patching.source import installed_source

pytestmark = pytest.mark.skipif(installed_source() is None, reason="megatron-core is not installed")

SNAPSHOT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed, importlib.metadata
import mindspeed, mindspeed.device
mindspeed.device.install("cpu")
plan = mindspeed.plan(level=0, device="cpu")

def load():
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.distributed

def watched(name):
    top = name.partition(".")[0]
    return top == "megatron" or name in ("torch", "importlib.metadata") or name.startswith(
        ("torch.cuda", "torch.distributed"))

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if watched(name):
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    found.update(((name, key, k), id(v)) for k, v in vars(value).items()
                                 if not k.startswith("__") or k in ("__init__", "__new__"))
    return found

def differences(before, after):
    return sorted(k for k in {*before, *after} if before.get(k) != after.get(k))

def state(handle):
    # What became of each target, and the module of what now stands there.
    rows = []
    for row in handle.report().rows:
        module, _, path = row.target.partition(":")
        owner = vars(sys.modules[module]).get(path.split(".")[0]) if module in sys.modules else None
        rows.append((row.target, row.status, getattr(owner, "__module__", None)))
    return rows
"""

# First in this order, with everything looked at on the way ...
IMPORT_FIRST = """
early = mindspeed.apply(plan)
assert not [name for name in sys.modules if name.startswith("megatron")]
finders = len(sys.meta_path)
early.undo()
assert len(sys.meta_path) < finders
load()
mindspeed.apply(plan).undo()   # once, so that lazy parts of torch are loaded before the snapshot
before, operators = snapshot(), set(vars(torch.ops))
handle = mindspeed.apply(plan)
changed = differences(before, snapshot())
applied = [row for row in handle.report().rows if row.status == "applied" and ":" in row.target]
assert len(changed) >= len(applied) >= 10
assert all(key[0].startswith("megatron.") for key in changed), changed
print(state(handle))
handle.undo()
assert differences(before, snapshot()) == []
assert set(vars(torch.ops)) == operators
"""

# ... then the other way round.
APPLY_FIRST = "handle = mindspeed.apply(plan); load(); print(state(handle))"


def run(code):
    done = subprocess.run([sys.executable, "-c", SNAPSHOT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_megatron_comes_back_to_the_last_attribute_and_the_order_makes_no_difference():
    first = run(IMPORT_FIRST)
    assert "'applied'" in first
    assert run(APPLY_FIRST) == first
