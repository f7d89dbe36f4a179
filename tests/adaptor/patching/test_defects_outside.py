"""Defects E12 to E14: what happens outside the engine. Here they are properties of the whole tree.

E12 changes of torch, E13 writes outside the engine, E14 the wrong per-parameter norm.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mindspeed
from mindspeed.features import load_features

SOURCES = Path(mindspeed.__file__).parent


def test_e12_torch_is_out_of_reach(lab):
    """A record that targets torch cannot even be made, and no value module may assign to it."""
    with pytest.raises(ValueError, match="torch stays unchanged"):
        lab.patch("torch:compile")
    targets = [patch.target for feature in load_features() for patch in feature.patches]
    assert targets
    assert all(target.startswith("megatron.") for target in targets)


# The only files that may write into something that they imported, each with what it does.
WRITERS = {
    "patching/slot.py": "puts values at their targets and takes them back",
    "launch.py": "runs a script as Python would: its own sys.argv and sys.path",
    "processes.py": "makes spawned children install the device layer; has an undo of its own",
}


def test_e13_nothing_is_written_outside_the_engine():
    """Static: no `setattr`, and no assignment into anything imported, in features and engine."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        if "/" not in name or name.startswith(("features/", "patching/")):
            lines = _foreign_writes(ast.parse(path.read_text()))
            if lines and name not in WRITERS:
                found[name] = lines
    assert found == {}
    assert _foreign_writes(ast.parse("import torch\ntorch.compile = 1"))
    assert _foreign_writes(ast.parse("from a import b\nb.c['x'] += 1"))
    assert _foreign_writes(ast.parse("setattr(x, 'y', 1)"))


def _foreign_writes(tree):
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            lines.append((node.lineno, "setattr"))
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else ():
            inner = target
            while isinstance(inner, (ast.Attribute, ast.Subscript)):
                inner = inner.value
            plain = isinstance(target, ast.Name)
            if not plain and isinstance(inner, ast.Name) and inner.id in imported:
                lines.append((node.lineno, ast.unparse(target)))
    return lines


def test_e14_there_is_no_norm_of_ours_to_be_wrong():
    """The stand-in for `amp_C.multi_tensor_l2norm` is not corrected, it does not exist.

    Megatron brings a fallback of its own, and uses it when apex is absent; no record here targets a
    norm, and nothing may pretend that `amp_C` or `apex` is installed.
    """
    records = [patch for feature in load_features() for patch in feature.patches]
    assert not [patch for patch in records if "l2norm" in patch.target or "l2norm" in patch.value]
    code = "import sys, mindspeed; mindspeed.apply(mindspeed.plan(level=0)); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"amp_C", "apex"} & set(loaded.stdout.split())
