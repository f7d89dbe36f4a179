"""`mindspeed doctor`: what is installed, whether it fits, and what to do about it.

Nothing that is examined is imported: versions come from metadata, places from finders.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindspeed import levels
from mindspeed.patching.detect import device_type
from mindspeed.patching.errors import PlanError
from mindspeed.patching.fingerprints import in_range
from mindspeed.patching.plan import plan
from mindspeed.patching.records import SUPPORTED_MEGATRON
from mindspeed.patching.source import SourceTree, installed_source, installed_version

Verdict = Literal["ok", "note", "bad"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OLDEST_TORCH = (2, 6)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: `ok`; `note` works, with a cost; `bad` something will fail.
        subject: what was examined.
        found: what is there.
        advice: what to do, or what it costs; empty when there is nothing to do.
    """

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


# Import name -> what is lost without it.
OPTIONAL = {
    "transformer_engine": "--transformer-impl local is used; no fp8",
    "apex": "plain torch optimizer and norms are used",
    "triton": "no batch-invariant mode, no fused CUDA kernels of Megatron",
    "grouped_gemm": "experts are multiplied one after another",
}
NEEDED_BY_TRAINING = ("pydantic", "six", "regex", "yaml")


def examine() -> list[Finding]:
    """Every finding, in reading order."""
    source = installed_source()
    version = installed_version(source)
    return [
        _python(),
        _torch(),
        *_npu(),
        _device(),
        *_megatron(source, version),
        *_packages(),
        *_optional(),
        *_training(source),
        *_checkpointing(version),
        *_bytecode(source),
        _compiler(),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _python() -> Finding:
    return Finding("ok", "Python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("bad", "torch", "not installed", "pip install torch")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        return Finding("bad", "torch", version, "install torch 2.6 or later")
    return Finding("ok", "torch", version)


def _npu() -> Iterator[Finding]:
    version = _version("torch_npu")
    if version is None:
        yield Finding("ok", "torch_npu", "not installed", "only needed on an Ascend NPU")
        return
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if home:
        yield Finding("ok", "torch_npu", f"{version}, CANN at {home}")
    elif os.environ.get(AUTOLOAD) == "0":
        yield Finding("note", "torch_npu", f"{version}, no CANN", "autoload is off, so torch works")
    else:
        advice = f"importing torch will fail here: set {AUTOLOAD}=0, or source CANN's set_env.sh"
        yield Finding("bad", "torch_npu", f"{version}, no CANN", advice)


def _device() -> Finding:
    try:
        found = device_type()
    except ValueError as error:
        return Finding("bad", "device", os.environ.get("MS_DEVICE", ""), str(error))
    origin = "from MS_DEVICE" if os.environ.get("MS_DEVICE") else "detected"
    return Finding("ok", "device", f"{found}, {origin}")


def _megatron(source: SourceTree | None, version: str | None) -> Iterator[Finding]:
    if source is None or version is None:
        advice = "pip install 'mindspeed[train]', or put a Megatron-LM checkout on PYTHONPATH"
        yield Finding("bad", "megatron-core", "not installed", advice)
        return
    where = ", ".join(str(portion) for portion in source.portions)
    if not in_range(version):
        advice = f"supported is {SUPPORTED_MEGATRON}"
        yield Finding("bad", "megatron-core", f"{version} at {where}", advice)
    else:
        yield Finding("ok", "megatron-core", f"{version} at {where}")
    training = source.has_package("megatron.training")
    advice = "" if training else "pretrain_gpt.py needs a Megatron-LM checkout on PYTHONPATH"
    found = "there" if training else "not there (the wheel has megatron.core only)"
    yield Finding("ok", "megatron.training", found, advice)
    yield _drift()


def _drift() -> Finding:
    try:
        made = plan(level=0, device="cpu")
    except PlanError as error:
        return Finding("bad", "level-0 plan", "refused", "; ".join(error.problems))
    count = sum(step.note == "no signature recorded" for step in made.acting)
    found = made.summary()
    if count:
        advice = "run: mindspeed fingerprint --from <wheel or checkout>"
        return Finding("note", "level-0 plan", f"{found}, {count} without a signature", advice)
    return Finding("ok", "level-0 plan", found)


def _packages() -> Iterator[Finding]:
    for level in levels.LEVELS[1:]:
        absent = levels.missing(levels.needed_for(level))
        if absent:
            advice = f"pip install 'mindspeed[l{level}]'; until then use a lower level"
            yield Finding("note", f"level {level}", f"{', '.join(absent)} missing", advice)
        else:
            yield Finding("ok", f"level {level}", levels.MEANING[level])


def _optional() -> Iterator[Finding]:
    for name, cost in OPTIONAL.items():
        found = "installed" if _has(name) else "not installed"
        yield Finding("ok", name, found, "" if _has(name) else cost)


def _training(source: SourceTree | None) -> Iterator[Finding]:
    if source is None or not source.has_package("megatron.training"):
        return
    absent = [name for name in NEEDED_BY_TRAINING if not _has(name)]
    if absent:
        names = " ".join("pyyaml" if name == "yaml" else name for name in absent)
        yield Finding("bad", "megatron.training needs", f"{names} missing", f"pip install {names}")


def _checkpointing(version: str | None) -> Iterator[Finding]:
    if not _has("psutil"):
        advice = "pip install psutil; saving a checkpoint hangs for ever without it"
        yield Finding("bad", "psutil", "not installed", advice)
    numpy = _version("numpy") or ""
    if version is not None and version.startswith("0.14") and numpy.startswith("2"):
        advice = "checkpoints of 0.14 use numpy 1 names: pip install 'numpy<2'"
        yield Finding("note", "numpy", numpy, advice)


def _bytecode(source: SourceTree | None) -> Iterator[Finding]:
    if source is None or not source.portions:
        return
    place = bytecode_folder(source)
    if sys.dont_write_bytecode:
        advice = "unset PYTHONDONTWRITEBYTECODE; each start rewrites Megatron's source again"
        yield Finding("note", "bytecode cache", "switched off", advice)
    elif _is_writable(place):
        yield Finding("ok", "bytecode cache", f"{place} is writable")
    else:
        advice = "set PYTHONPYCACHEPREFIX to a writable folder; each start pays a second or two"
        yield Finding("note", "bytecode cache", f"{place} is not writable", advice)


def bytecode_folder(source: SourceTree) -> Path:
    """Where Python keeps the bytecode of Megatron's first package."""
    module = source.portions[0] / "core" / "__init__.py"
    return Path(importlib.util.cache_from_source(str(module))).parent


def _is_writable(folder: Path) -> bool:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return os.access(existing, os.W_OK)


def _compiler() -> Finding:
    name = os.environ.get("CXX") or "g++"
    if shutil.which(name):
        return Finding("ok", "C++ compiler", name)
    return Finding("ok", "C++ compiler", "none", "torch.compile is not used on the CPU")
