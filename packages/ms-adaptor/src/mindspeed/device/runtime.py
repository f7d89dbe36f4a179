"""What stands for ``torch.cuda``: the NPU's namespace, and the last resort of every namespace."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType
from typing import Any

import torch


class NpuRuntime:
    """``torch.npu`` under the names that Megatron asks of ``torch.cuda``.

    A name that ``torch.npu`` lacks is taken from ``torch.cuda`` and recorded in
    ``fallthrough`` together with the module that asked.
    """

    def __init__(self, npu: ModuleType) -> None:
        self._npu = npu
        self.fallthrough: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._npu, name):
            return getattr(self._npu, name)
        return fall_through(self.fallthrough, name)


def fall_through(record: dict[str, str], name: str) -> Any:
    """Take ``name`` from the real ``torch.cuda`` and note who asked for it.

    Raises:
        AttributeError: ``torch.cuda`` has no such name either.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    value = getattr(torch.cuda, name)
    record.setdefault(name, _asking_module())
    return value


def _asking_module() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(__package__):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame else "unknown"
