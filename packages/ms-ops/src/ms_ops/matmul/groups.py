"""Lists of groups: where each group of consecutive rows ends."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import fail

DEBUG = "MS_OPS_DEBUG"


def ends_of(
    op: str,
    rows: int,
    groups: int | None,
    offsets: Tensor | Sequence[int] | None,
    group_sizes: Tensor | Sequence[int] | None,
    device: torch.device,
) -> Tensor:
    """Return the cumulative ends of the groups, from offsets or from sizes.

    The values are checked where that costs nothing: on the host, outside of a trace; on a device
    only when the environment variable MS_OPS_DEBUG is 1, because it waits for the device.

    Args:
        op: the operator, for messages.
        rows: T, how many rows the groups cover.
        groups: E, how many groups there must be; None for any number.
        offsets: [E] ints, where each group ends; the last is T.
        group_sizes: [E] ints, how many rows each group has, in place of offsets.
        device: of the operator's other tensors; the list may also lie on the host.

    Raises:
        TypeError: not a list of ints nor an int32 or int64 tensor.
        ValueError: both lists or none, not one dimension, another length, ends that fall or do not
            end at T.
        RuntimeError: the list lies on a third device.
    """
    if (offsets is None) == (group_sizes is None):
        got = "neither" if offsets is None else "offsets and group_sizes"
        fail(ValueError, op, "offsets", got, "either offsets or group_sizes")
    name, given = ("offsets", offsets) if offsets is not None else ("group_sizes", group_sizes)
    ends = _tensor(op, name, given)
    if ends.dim() != 1:
        fail(ValueError, op, name, f"{ends.dim()} dimensions", "1")
    if groups is not None and ends.shape[0] != groups:
        fail(ValueError, op, name, f"{ends.shape[0]} groups", f"{groups}")
    if ends.device.type != "cpu" and ends.device != device:
        fail(RuntimeError, op, name, f"device {ends.device}", f"{device}, or the host")
    if name == "group_sizes":
        ends = ends.cumsum(0)
    if _readable(ends):
        _check_values(op, name, ends.tolist(), rows)
    return ends


def _tensor(op: str, name: str, given: object) -> Tensor:
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int32, torch.int64):
            fail(TypeError, op, name, given.dtype, "int32 or int64")
        return given
    if not isinstance(given, (list, tuple)) or not all(isinstance(n, int) for n in given):
        fail(TypeError, op, name, type(given).__name__, "a tensor or a list of ints")
    return torch.tensor(given, dtype=torch.int64)


def _readable(ends: Tensor) -> bool:
    """Say whether the values may be read here: never in a trace, on a device only when asked."""
    if torch.compiler.is_compiling() or type(ends) is not Tensor or ends.is_meta:
        return False
    return ends.device.type == "cpu" or os.environ.get(DEBUG) == "1"


def _check_values(op: str, name: str, ends: list[int], rows: int) -> None:
    if any(b < a for a, b in zip([0, *ends], ends, strict=False)):
        need = "ends that do not fall" if name == "offsets" else "no negative size"
        fail(ValueError, op, name, _short(ends), need)
    if (ends[-1] if ends else 0) != rows:
        got = f"groups that end at row {ends[-1] if ends else 0}"
        fail(ValueError, op, name, got, f"the last to end at {rows}, the rows of x")


def _short(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"{ends[:8]}..."[:-1]
