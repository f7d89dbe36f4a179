"""The object that rewritten Megatron code asks instead of naming CUDA.

:class:`Lookup` is on (answers for the installed device) or off (answers what CUDA code would
get). Every answer is read at the time of use, so that switching it off undoes the device layer for
modules already loaded; only names bound at import (K6, decorators, default arguments) keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch

from mindspeed.device.descriptor import Descriptor

# These modules enable Triton kernels when CUDA is available, whatever the device of the tensors.
TRITON_MODULES = frozenset(
    {
        "megatron.core.fusions.fused_indices_converter",
        "megatron.core.fusions.fused_mla_yarn_rope_apply",
        "megatron.core.fusions.fused_pad_routing_map",
    }
)


class Lookup:
    """What ``cuda`` means to Megatron.

    Attributes:
        type: device type, ``"cuda"`` when off.
        backend: process-group backend, ``"nccl"`` when off.
        pin: whether ``pin_memory=True`` stays true.
        cuda: the runtime namespace that stands for ``torch.cuda``.
    """

    def __init__(self, descriptor: Descriptor, runtime: Any) -> None:
        self.descriptor = descriptor
        self.runtime = runtime
        self._views: list[Lookup] = []
        self.turn_on()

    def turn_on(self) -> None:
        """Answer for the descriptor's device."""
        d = self.descriptor
        self._set(d.type, d.backend, d.pin, self.runtime)

    def turn_off(self) -> None:
        """Answer what unchanged CUDA code would see."""
        self._set("cuda", "nccl", True, torch.cuda)

    @property
    def is_on(self) -> bool:
        """Whether the look-up answers for the descriptor's device."""
        return self.cuda is self.runtime

    def _set(self, type: str, backend: str, pin: bool, cuda: Any) -> None:
        self.type, self.backend, self.pin, self.cuda = type, backend, pin, cuda
        for view in self._views:
            view._set(type, backend, pin, view.runtime if cuda is self.runtime else cuda)

    def for_module(self, name: str) -> Lookup:
        """The look-up that module ``name`` gets: itself, or a view that denies CUDA."""
        if name not in TRITON_MODULES:
            return self
        view = Lookup(self.descriptor, _Unavailable(self.runtime))
        self._views.append(view)
        if not self.is_on:
            view.turn_off()
        return view

    def to_device(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """``x.cuda(device, non_blocking)`` for a tensor or module on this device."""
        if self.type == "cuda":
            return x.cuda(*args, **kwargs)
        return self._moved(x, *args, **kwargs)

    def _moved(self, x: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        target = self.cuda.current_device() if device is None else self._named(device)
        if isinstance(x, torch.nn.Module):
            return x.to(target)
        return x.to(target, non_blocking=non_blocking and self.pin, **kwargs)

    def _named(self, device: Any) -> torch.device:
        index = torch.device(device).index if not isinstance(device, int) else device
        return torch.device(self.type) if self.type == "cpu" else torch.device(self.type, index)

    def is_dev(self, x: Any) -> bool:
        """``x.is_cuda`` for this device: true iff ``x`` lives on a device of this type."""
        return bool(x.is_cuda) if self.type == "cuda" else x.device.type == self.type

    def pinned(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """``x.pin_memory()``; the same tensor where host memory is device memory."""
        return x.pin_memory(*args, **kwargs) if self.pin else x

    def typestr(self, name: str) -> str:
        """What ``Tensor.type()`` returns on this device for ``torch.cuda.<name>``."""
        return f"torch.{name}" if self.type == "cpu" else f"torch.{self.type}.{name}"

    def import_name(self, module: str, name: str) -> Any:
        """The object that ``from module import name`` binds, with ``torch.cuda`` exchanged.

        Raises:
            ImportError: as the statement would, when there is no such name.
        """
        owner = self.cuda
        try:
            for part in [*module.split(".")[2:], name]:
                owner = getattr(owner, part)
        except AttributeError as error:
            raise ImportError(
                f"cannot import name {name!r} from {module!r}", name=module
            ) from error
        return owner


class _Unavailable:
    """A runtime namespace that says the device is not available and is otherwise the inner one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def is_available(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
