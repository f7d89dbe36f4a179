"""Which device a plan is for, found without importing torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

DEVICES = ("cpu", "npu", "cuda")


def device_type(device: str = "auto") -> str:
    """`cpu`, `npu` or `cuda`.

    `auto` asks, in this order: an installed device layer, the variable `MS_DEVICE`, the device
    files of the machine together with what torch was built for.

    Raises:
        ValueError: another name, from the argument or from `MS_DEVICE`.
    """
    if device != "auto":
        return _checked(device, "device")
    layer = sys.modules.get("mindspeed.device")
    descriptor = layer.current() if layer is not None else None
    if descriptor is not None:
        return _checked(descriptor.type, "device layer")
    if named := os.environ.get("MS_DEVICE"):
        return _checked(named, "MS_DEVICE")
    if _has_device_file("davinci[0-9]*") and importlib.util.find_spec("torch_npu"):
        return "npu"
    return "cuda" if _has_device_file("nvidia[0-9]*") and _torch_has_cuda() else "cpu"


def _checked(name: str, origin: str) -> str:
    if name not in DEVICES:
        raise ValueError(f"{origin} is {name!r}; it must be 'auto', 'cpu', 'npu' or 'cuda'")
    return name


def _has_device_file(pattern: str) -> bool:
    return any(Path("/dev").glob(pattern))


def _torch_has_cuda() -> bool:
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
