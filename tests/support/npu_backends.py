"""The files of the NPU backends, and which of their lines ran in child processes."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import ms_ops
from support.lines import function_lines, lines_run


def backend_files() -> set[str]:
    """Return the files of the NPU backends."""
    found = set()
    for module in pkgutil.walk_packages(ms_ops.__path__, "ms_ops."):
        last = module.name.rpartition(".")[2]
        if last.startswith("npu") and ".testing" not in module.name:
            found.add(str(importlib.import_module(module.name).__file__))
    return found


@contextmanager
def noted_lines(folder: Path) -> Iterator[None]:
    """Write the lines of the backends that this process runs in the block into a folder."""
    # Tracing follows one thread: backward stays in it.
    with torch.autograd.set_multithreading_enabled(False), lines_run(backend_files()) as seen:
        try:
            yield
        finally:
            lines = {file: sorted(numbers) for file, numbers in seen.items()}
            (folder / f"{os.getpid()}.json").write_text(json.dumps(lines))


def never_run(folder: Path) -> dict[str, list[str]]:
    """Return the lines of function bodies that no process noted, as text, by short file name."""
    seen: dict[str, set[int]] = {file: set() for file in backend_files()}
    for path in folder.glob("*.json"):
        for file, lines in json.loads(path.read_text()).items():
            seen[file].update(lines)
    missing = {}
    for file, lines in seen.items():
        source = Path(file).read_text(encoding="utf-8").splitlines()
        rest = sorted(function_lines(file) - lines)
        if rest:
            missing[file.rpartition("ms_ops/")[2]] = [source[n - 1].strip() for n in rest]
    return missing
