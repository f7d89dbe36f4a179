"""Defining the emulated operators, and letting the backends "npu" serve CPU tensors meanwhile."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ms_ops

from ... import registry
from ...matmul.npu import ATB
from ...registry import Facts, Kernel
from . import readings as _readings
from .matmul import TORCHS
from .readings import Readings

# Modules of this folder that hold KERNELS, functions by the operator's qualified name.
FAMILIES = (
    "activation",
    "attention",
    "comm",
    "ffn",
    "matmul",
    "merge",
    "moe",
    "moe_map",
    "norm",
    "rope",
    "softmax",
)


@cache
def recorded_schemas() -> dict[str, str]:
    """Return the recorded schemas by qualified operator name."""
    text = (Path(__file__).parent / "schemas.json").read_text(encoding="utf-8")
    schemas: dict[str, str] = json.loads(text)["schemas"]
    return schemas


class Called(NamedTuple):
    """A call of an emulated operator: its qualified name and the arguments given, by name."""

    name: str
    given: dict[str, Any]


@contextmanager
def emulated_npu(readings: Readings | None = None) -> Iterator[list[Called]]:
    """Define the emulated operators and offer the backends "npu" for CPU tensors in a block.

    Yields:
        The calls of emulated operators so far.

    Raises:
        RuntimeError: the real torch_npu is loaded, or an emulation is on already.
    """
    if "torch_npu" in sys.modules:
        raise RuntimeError("emulated_npu: torch_npu is loaded, its own operators are in place")
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        raise RuntimeError("emulated_npu: already on")
    _readings.push(readings or Readings())
    atb = os.environ.setdefault(ATB, "emulated")
    calls: list[Called] = []
    libraries = _define(calls)
    served = [name for name in registry.operators() if _offer(name)]
    try:
        yield calls
    finally:
        for name in served:
            ms_ops.unregister_backend(name, "npu")
        for library in libraries:
            library._destroy()
        if atb == "emulated":
            del os.environ[ATB]
        _readings.pop()


@cache
def _kernels() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for family in FAMILIES:
        found |= importlib.import_module(f".{family}", __package__).KERNELS
    return found


def _define(calls: list[Called]) -> list[torch.library.Library]:
    libraries = {}
    for name, schema in recorded_schemas().items():
        namespace, op = name.split("::")
        if namespace not in libraries:
            libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        library = libraries[namespace]
        library.define(schema.removeprefix(f"{namespace}::"))
        library.impl(op, _noted(name, _kernels()[name], calls), "CPU")
        # The same code gives shapes on meta tensors, for tracing.
        library.impl(op, _kernels()[name], "Meta")
    own = torch.library.Library("aten", "IMPL")
    for name, kernel in TORCHS.items():
        base, _, overload = name.partition(".")
        if (overload or "default") in getattr(torch.ops.aten, base[6:]).overloads():
            own.impl(name, _noted(name, kernel, calls), "CPU")
    return [*libraries.values(), own]


def _noted(name: str, kernel: Callable[..., Any], calls: list[Called]) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    schema = torch._C._get_schema(base, overload)
    names = [argument.name for argument in schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(Called(name, dict(zip(names, args, strict=False)) | kwargs))
        return kernel(*args, **kwargs)

    return run


def _offer(name: str) -> bool:
    """Put the operator's own NPU backend in its place, with CPU tensors taken for NPU ones."""
    backend = registry.backends(name).get("npu")
    if backend is None:
        return False
    kernels = {name: _on_cpu(backend.kernels[name])}
    registry.register_backend(name, replace(backend, kernels=kernels, available=lambda: None))
    return True


def _on_cpu(kernel: Kernel) -> Kernel:
    def supports(facts: Facts) -> str | None:
        return kernel.supports(facts._replace(device="npu")) if facts.device == "cpu" else "no NPU"

    return replace(kernel, supports=supports)
