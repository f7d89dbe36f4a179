"""The one wording of argument errors: `op: argument: got X, need Y`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .device import FLOATS


def fail(kind: type[Exception], op: str, argument: str, got: object, need: str) -> NoReturn:
    """Raise `kind` with the package's standard wording."""
    raise kind(f"{op}: {argument}: got {got}, need {need}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        fail(TypeError, op, argument, type(value).__name__, "a torch.Tensor")


def check_float(
    op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS
) -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        fail(TypeError, op, argument, tensor.dtype, f"one of {names}")


def check_same_dtype(op: str, argument: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Raise TypeError unless both tensors share a dtype."""
    if tensor.dtype != like.dtype:
        fail(TypeError, op, argument, tensor.dtype, f"{like.dtype}, the dtype of {other}")


def check_choice(op: str, argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        fail(ValueError, op, argument, repr(value), "one of " + ", ".join(map(repr, choices)))
