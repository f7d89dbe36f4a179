"""The device layer: unmodified Megatron on the CPU and on an Ascend NPU.

``install()`` puts an import hook for ``megatron.*`` in place. torch itself, and every other
library, keep the ``torch.cuda`` they had. On CUDA nothing is installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from mindspeed.device.descriptor import Descriptor, describe, npu_problem
from mindspeed.device.finder import (
    MegatronFinder,
    install_finder,
    loaded_unrewritten,
    rewritten_modules,
)
from mindspeed.device.lookup import Lookup
from mindspeed.device.runtime import NpuRuntime

__all__ = ["Descriptor", "Report", "current", "describe", "install", "npu_problem", "report"]
__all__ += ["uninstall"]


@dataclass
class _Installed:
    descriptor: Descriptor
    lookup: Lookup | None = None
    finder: MegatronFinder | None = None


_installed: _Installed | None = None
# Modules loaded once keep their look-up object, so a second installation must use the same one.
_lookups: dict[str, Lookup] = {}


def install(type: str | None = None) -> Descriptor:
    """Make ``cuda`` in ``megatron.*`` mean the given device; a second call is a no-op.

    Args:
        type: ``"cpu"``, ``"npu"`` or ``"cuda"``; by default ``MS_DEVICE``, else what is present.

    Raises:
        RuntimeError: another type is installed, or Megatron modules were imported before.
        ValueError: unknown type.
    """
    global _installed
    if _installed is not None and type in (None, _installed.descriptor.type):
        return _installed.descriptor
    descriptor = describe(type)
    if _installed is not None:
        raise RuntimeError(
            f"device layer: {_installed.descriptor.type!r} is installed, got {type!r}; "
            "call mindspeed.device.uninstall() first"
        )
    if descriptor.type == "cuda":
        _installed = _Installed(descriptor)
        return descriptor
    if loaded := loaded_unrewritten():
        raise RuntimeError(
            "device layer: import mindspeed.megatron_adaptor before Megatron; "
            f"already imported: {', '.join(loaded)}"
        )
    lookup = _lookup_for(descriptor)
    lookup.turn_on()
    _installed = _Installed(descriptor, lookup, install_finder(lookup))
    return descriptor


def _lookup_for(descriptor: Descriptor) -> Lookup:
    if others := set(_lookups) - {descriptor.type}:
        raise RuntimeError(
            f"device layer: this process has loaded Megatron for {others.pop()!r} and cannot "
            f"change to {descriptor.type!r}; start a new process"
        )
    if descriptor.type not in _lookups:
        _lookups[descriptor.type] = Lookup(descriptor, _runtime_for(descriptor))
    return _lookups[descriptor.type]


def _runtime_for(descriptor: Descriptor) -> Any:
    import torch

    if descriptor.type == "npu":
        return NpuRuntime(getattr(torch, "npu"))  # noqa: B009 -- torch_npu adds it
    from mindspeed.device.cpu import CpuRuntime

    return CpuRuntime()


def uninstall() -> None:
    """Remove the import hook and make loaded modules answer as unchanged CUDA code."""
    global _installed
    if _installed is None:
        return
    if _installed.finder is not None:
        sys.meta_path.remove(_installed.finder)
    if _installed.lookup is not None:
        _installed.lookup.turn_off()
    _installed = None


def current() -> Descriptor | None:
    """The installed descriptor, or None."""
    return _installed.descriptor if _installed else None


@dataclass(frozen=True)
class Report:
    """What the device layer did.

    Attributes:
        descriptor: the installed device.
        places: rewritten places by module and kind (``K1`` to ``K9``).
        fallthrough: names of the real ``torch.cuda`` that Megatron reached, and who asked.
    """

    descriptor: Descriptor | None
    places: dict[str, dict[str, int]]
    fallthrough: dict[str, str]


def report() -> Report:
    """Describe the installation and what it rewrote so far."""
    if _installed is None or _installed.lookup is None:
        return Report(current(), {}, {})
    places = {name: dict(counts) for name, counts in rewritten_modules().items()}
    return Report(current(), places, dict(_installed.lookup.runtime.fallthrough))
