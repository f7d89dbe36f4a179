"""Children of a process that uses the device layer use it as well.

A forked child inherits everything. A spawned one is a fresh interpreter that first runs the main
script again and only then learns what to do, so a script without the one-line import would load
Megatron unchanged there. While propagation is on, the data that multiprocessing sends ahead of
the main script carries one more entry, which installs the device layer when it is read.

What is sent is the device type and whether `mindspeed.megatron_adaptor` is loaded; features above
level 0 are activated from the arguments of whoever builds a model, also in a child.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

ADAPTOR = "mindspeed.megatron_adaptor"
KEY = "mindspeed"

_original: Any = None


class _Setup:
    """Unpickles as the result of `install_in_child` of the device type and the adaptor's use."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from mindspeed import device

        descriptor = device.current()
        return install_in_child, (descriptor and descriptor.type, ADAPTOR in sys.modules)


def propagate() -> None:
    """Turn propagation to spawned children on; a second call is a no-op."""
    global _original
    if _original is not None:
        return
    original: Callable[[str], dict[str, Any]] = spawn.get_preparation_data
    _original = original

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**original(name), KEY: _Setup()}

    spawn.get_preparation_data = get_preparation_data


def stop() -> None:
    """Turn propagation off again.

    Raises:
        RuntimeError: Another library has replaced multiprocessing's function meanwhile.
    """
    global _original
    if _original is None:
        return
    if getattr(spawn.get_preparation_data, "__module__", None) != __name__:
        raise RuntimeError(
            "multiprocessing.spawn.get_preparation_data was replaced by "
            f"{spawn.get_preparation_data!r} after mindspeed; undo that first"
        )
    spawn.get_preparation_data = _original
    _original = None


def propagating() -> bool:
    """Whether spawned children get the device layer."""
    return _original is not None


def install_in_child(device_type: str | None, adaptor: bool) -> None:
    """Repeat the parent's installation; called while a spawned child reads its first message.

    Args:
        device_type: Type of the installed device layer, or None if there was none.
        adaptor: Whether the parent had imported `mindspeed.megatron_adaptor`.
    """
    if device_type is not None:
        from mindspeed import device

        device.install(device_type)
    if adaptor:
        importlib.import_module(ADAPTOR)
    propagate()  # its own children, too
