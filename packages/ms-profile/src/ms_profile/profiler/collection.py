"""What a trace records, checked for contradictions; and the backend that can record it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

__all__ = ["Analyse", "Backend", "Collection", "backend_name", "has_accelerator"]

Analyse = Literal["now", "async", "later"]
_BACKENDS = ("auto", "torch", "npu", "none")


@dataclass(frozen=True)
class Collection:
    """What is recorded.

    Attributes:
        level: detail on an NPU: 0 operators on the device, 1 the runtime's layer, core metrics and
            communication as well, 2 AI CPU and the lower runtime as well. torch.profiler has no
            levels; from 1 on it names the groups of gloo's collectives.
        cpu: operators on the host.
        device: kernels on the accelerator.
        memory: allocations; needs `cpu`.
        stack: the Python call stack of each operator; needs `cpu`.
        shapes: sizes of operators' inputs; needs `cpu`.
        analyse: when torch_npu parses what it collected: "now" and training waits, "async" in
            other processes, "later" by hand with `torch_npu.profiler.profiler.analyse`.

    Raises:
        ValueError: a value is out of range, or asks for what cannot be recorded.
    """

    level: int = 0
    cpu: bool = True
    device: bool = True
    memory: bool = False
    stack: bool = False
    shapes: bool = False
    analyse: Analyse = "now"

    def __post_init__(self) -> None:
        if self.level not in (0, 1, 2) or isinstance(self.level, bool):
            raise ValueError(f"level must be 0, 1 or 2, got {self.level!r}")
        if not (self.cpu or self.device):
            raise ValueError("nothing to record: give cpu=True, device=True or both")
        for name in ("memory", "stack", "shapes"):
            if getattr(self, name) and not self.cpu:
                raise ValueError(f"{name}=True records the host's operators: give cpu=True as well")
        if self.analyse not in get_args(Analyse):
            raise ValueError(f"analyse must be 'now', 'async' or 'later', got {self.analyse!r}")


class Backend(Protocol):
    """A profiler for one window. Whatever it raises ends the trace and not the training."""

    name: str

    @property
    def profiler(self) -> Any:
        """The library's own profiler object, for handlers that are written for it."""

    def prepare(self, warmup: int, active: int) -> None:
        """Switch on, `warmup` iterations before the first of `active` that are recorded."""

    def begin(self, iteration: int) -> None:
        """A recorded iteration starts."""

    def end(self, iteration: int) -> None:
        """It has ended."""

    def stop(self) -> None:
        """The last recorded iteration has ended."""

    def export(self, folder: Path, stem: str) -> Sequence[Path]:
        """Write the trace; returns what was written."""

    def operators(self) -> list[dict[str, Any]]:
        """Times and calls of each operator, most of its own time first; empty if not known."""

    def abandon(self) -> None:
        """Switch off after an error, as well as that goes."""


def backend_name(asked: str) -> str:
    """The backend that is used: "torch", "npu" or "none".

    Raises:
        ValueError: there is no such backend, or it cannot be used here.
    """
    if asked not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {asked!r}")
    if asked == "auto":
        return "npu" if _has_npu() else "torch"
    if asked == "npu" and importlib.util.find_spec("torch_npu") is None:
        raise ValueError("backend='npu' needs torch_npu, which is not installed")
    return asked


def has_accelerator() -> bool:
    """Whether torch knows an accelerator that is there."""
    return bool(torch.accelerator.is_available())


def _has_npu() -> bool:
    npu = getattr(torch, "npu", None)  # there once torch_npu is imported
    return npu is not None and bool(npu.is_available())
