"""Importing a package of ours changes nothing, and its source keeps away from what could."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from .workspace import LIBRARIES, PACKAGES, ROOT, run_python

OBSERVE = """
import importlib, json, os, signal, sys, threading, warnings
before_torch = "torch" in sys.modules
if sys.argv[2] == "torch-first":
    import torch, torch.distributed, torch.nn.functional, torch.utils.checkpoint
sys.argv[1:] = ["--not", "--yours", sys.argv[1]]

def attributes():
    wanted = [n for n in sys.modules if n.split(".")[0] == "torch"]
    return {
        (name, key): id(value)
        for name in wanted if (module := sys.modules[name]) is not None
        for key, value in list(vars(module).items())
        if not key.startswith("__")
    }

def state():
    found = {
        "argv": list(sys.argv), "environ": dict(os.environ), "cwd": os.getcwd(),
        "path": list(sys.path), "meta_path": [repr(f) for f in sys.meta_path],
        "path_hooks": len(sys.path_hooks), "excepthook": id(sys.excepthook),
        "filters": [repr(f) for f in warnings.filters], "threads": threading.active_count(),
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "builtins": {k: id(v) for k, v in vars(__builtins__).items()},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.random.initial_seed(),
            str(torch.get_float32_matmul_precision()), torch.distributed.is_initialized(),
        ]
    return found

objects, before = attributes(), state()
importlib.import_module(sys.argv[-1])
after, later = state(), attributes()
print(json.dumps({
    "changed": sorted(k for k in before if before[k] != after.get(k)),
    "torch changed": sorted(
        ".".join(k) for k, v in objects.items() if later.get(k) not in (v,)
    ),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "torch": "torch" in sys.modules,
}))
"""


def observed(module: str, first: str) -> dict:
    return json.loads(run_python(OBSERVE, module, first))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_import_has_no_effect(package):
    seen = observed(package.module, "torch-first")
    assert seen["changed"] == []
    assert seen["torch changed"] == []
    assert not set(seen["modules"]) & {"megatron", "torch_npu", "triton", "transformer_engine"}


@pytest.mark.parametrize("module", ["mindspeed", "mindspeed.cli", "mindspeed.patching"])
def test_adaptor_and_its_tools_are_light(module):
    """`mindspeed --help` and the plan must not wait for torch, nor need any of the others."""
    seen = observed(module, "nothing-first")
    assert seen["changed"] == []
    assert not seen["torch"]
    assert not set(seen["modules"]) & {"megatron", "numpy", "ms_ops", "ms_profile"}


def test_the_observer_sees_effects(tmp_path):
    """The check above is worth something: it reports what a careless package does."""
    (tmp_path / "careless.py").write_text(
        "import os, sys, torch\nos.environ['X_CARELESS'] = '1'\nsys.argv.append('x')\n"
        "torch.cuda.is_available = lambda: True\ntorch.set_num_threads(3)\n"
    )
    seen = json.loads(run_python(OBSERVE, "careless", "torch-first", PYTHONPATH=str(tmp_path)))
    assert {"argv", "environ", "torch"} <= set(seen["changed"])
    assert seen["torch changed"] == ["torch.cuda.is_available"]


FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve",
    "socket", "http", "urllib", "requests", "ftplib", "smtplib", "telnetlib",
}  # fmt: skip
FORBIDDEN_CALLS = {"exec", "eval", "__import__", "os.system", "os.popen", "pickle.loads"}
LAZY_MODULES = {"torch_npu", "triton", "megatron", "transformer_engine", "apex"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lazy_ones(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] in LAZY_MODULES]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def unsafe_places(tree: ast.AST) -> list[str]:
    """Places that load code or data unsafely, start a shell, use the network or the home folder."""
    found = []
    for node in ast.walk(tree):
        found += [n for n in imported(node) if n.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or name.endswith((".expanduser", "Path.home")):
            found.append(name)
        if keywords.get("shell") == "True":
            found.append(f"{name}(shell=True)")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
    return found


def at_import(tree: ast.Module) -> list[str]:
    """Modules that are imported when the file is: outside functions and type checking."""
    found: list[str] = []
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        found += imported(node)
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_source_is_safe(package):
    assert package.sources
    bad = {
        str(path.relative_to(package.path)): places
        for path in package.sources
        if (places := unsafe_places(parsed(path)))
    }
    assert bad == {}


def environment_names(tree: ast.Module) -> set[str]:
    """Names of the environment variables that a file reads or writes, constants resolved."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and dotted(node.value) == "os.environ":
            keys.append(node.slice)
        elif isinstance(node, ast.Call) and dotted(node.func) in READERS and node.args:
            keys.append(node.args[0])
    table = environment_table(tree)
    # A variable of a loop over the module's own table stands for the names in it.
    names = {ast.unparse(key) for key in keys if not (table and isinstance(key, ast.Name))}
    return {str(constants.get(name, name)).strip("'") for name in names} | table


def environment_table(tree: ast.Module) -> set[str]:
    """Keys of a module's `ENVIRONMENT`, the table of the variables that it sets."""
    tables = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ENVIRONMENT"
    )
    dicts = (d for value in tables if value for d in ast.walk(value) if isinstance(d, ast.Dict))
    return {str(key.value) for d in dicts for key in d.keys if isinstance(key, ast.Constant)}


READERS = {"os.environ.get", "os.getenv", "os.environ.pop", "os.environ.setdefault"}


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", page.split("Megatron and torch")[0]))
    sources = [path for package in PACKAGES for path in package.sources]
    used = set().union(*(environment_names(parsed(path)) for path in sources))
    aliases = {"ATB", "PRELOAD_VARIABLE"}  # imported from the module that defines it
    assert used - aliases == documented


@pytest.mark.parametrize("package", LIBRARIES, ids=lambda p: p.name)
def test_backends_are_imported_at_first_use_only(package):
    """Only a backend's own module, which is itself imported lazily, may name its library."""
    bad = {
        str(path.relative_to(package.path)): names
        for path in package.sources
        if path.stem not in ("npu", "triton")
        and (
            names := [
                n for n in at_import(ast.parse(path.read_text())) if n.split(".")[0] in LAZY_MODULES
            ]
        )
    }
    assert bad == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    from urllib.request import urlopen",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import torch\ntorch.load('x')",
        "from pathlib import Path\nPath.home()",
        "import os\nos.path.expanduser('~')",
    ],
)
def test_the_scan_finds(text):
    assert unsafe_places(ast.parse(text)) != []


def test_the_scan_tells_lazy_from_eager():
    eager = "import triton\ntry:\n    import torch_npu\nexcept ImportError:\n    pass"
    assert set(at_import(ast.parse(eager))) == {"triton", "torch_npu"}
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton\n"
    assert at_import(ast.parse(f"{typing}def f():\n    import triton")) == ["typing"]
