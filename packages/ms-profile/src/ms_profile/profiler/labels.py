"""Names the process group of each collective in a trace, where the backend's rows do not.

NCCL and HCCL write the group into their rows. Gloo does not, so a dispatch mode puts a row
`all_reduce [TENSOR_MODEL_PARALLEL_GROUP]` around each of its collectives. While it is on, torch
shows every operator twice, once before and once behind the mode, so it is not always on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    _resolve_process_group,
)
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GroupLabels", "group_label"]

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class GroupLabels(TorchDispatchMode):
    """Inside, each collective that is issued runs in a row that names its group."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @staticmethod
    def is_usable() -> bool:
        """Whether compiled regions stay compiled under it; where not, it would change numbers."""
        return hasattr(TorchDispatchMode, "ignore_compile_internals")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions run as if the mode were off."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _NAMESPACES or (group := _group(func, args, kwargs)) is None:
            return func(*args, **kwargs)
        with record_function(f"{func.overloadpacket.__name__.rstrip('_')} [{group_label(group)}]"):
            return func(*args, **kwargs)


def group_label(group: dist.ProcessGroup) -> str:
    """The description that the group was made with, else its name."""
    description = getattr(group, "group_desc", "")
    return description if description not in ("", "undefined") else group.group_name


def _group(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return dist.ProcessGroup.unbox(value)
        if argument.name == "group_name":
            return _by_name(value)
    return _by_name(kwargs["group_name"]) if "group_name" in kwargs else None


def _by_name(name: Any) -> Any:
    with suppress(RuntimeError, KeyError, TypeError):
        return _resolve_process_group(name)
    return None
