"""Megatron's C++ dataset helpers, built for the interpreter that runs."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

_MODULE = "megatron.core.datasets.helpers_cpp"


def compile_helpers() -> None:
    """Make ``megatron.core.datasets.helpers_cpp`` importable.

    A module that imports is left alone. Otherwise one compiler call builds it beside its source,
    or in a temporary folder where that place is read-only.

    Raises:
        RuntimeError: no compiler, no pybind11, or the compilation failed; says what to do.
    """
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        _build()
        importlib.invalidate_caches()
        importlib.import_module(_MODULE)


def _build() -> None:
    package = importlib.import_module("megatron.core.datasets")
    source = Path(next(iter(package.__path__))) / "helpers.cpp"
    folder = source.parent
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="megatron_datasets_"))
        package.__path__.append(str(folder))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            f"{_MODULE}: no C++ compiler found; install g++ (or the megatron-core wheel, which "
            "ships the built module)"
        )
    target = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    _compile(compiler, source, target)


def _compile(compiler: str, source: Path, target: Path) -> None:
    # Several ranks may build at once: each writes a file of its own, the last rename wins.
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    flags = ["-O3", "-shared", "-std=c++17", "-fPIC"]
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), _pybind11_include())]
    done = subprocess.run(
        [compiler, *flags, *includes, str(source), "-o", str(partial)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{_MODULE}: {compiler} failed on {source}:\n{done.stderr[-2000:]}")
    partial.replace(target)


def _pybind11_include() -> str:
    try:
        return str(importlib.import_module("pybind11").get_include())
    except ImportError as error:
        raise RuntimeError(f"{_MODULE}: pip install pybind11 to build it") from error
