"""Collectives by the group's name: torch's functional ones, which tracers keep in a graph.

`start_*` return at once; calling what they return waits for the result. Without a group (name "")
and for empty tensors nothing is sent. Sums run in the tensors' dtype: so many bytes go over the
wire.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.distributed._functional_collectives
from torch import Tensor

Pending = Callable[[], Tensor]
# The import above registers the shapes of their results.
_ops = torch.ops._c10d_functional


def there(x: Tensor) -> Pending:
    """Return what `start_*` returns, for a tensor that nobody waits for."""
    return partial(_same, x)


def _same(x: Tensor) -> Tensor:
    return x


def sum_ranks(x: Tensor, group: str) -> Tensor:
    """Return the sum of all ranks' tensors; `x` is the caller's own and may be written into."""
    if not group or not x.numel():
        return x
    # Only a trace needs the functional form, which copies first.
    reduce = _ops.all_reduce_ if type(x) is Tensor else _ops.all_reduce
    return cast(Tensor, _ops.wait_tensor(reduce(x.contiguous(), "sum", group)))


def start_gather(x: Tensor, group: str, size: int) -> Pending:
    """Begin to stack all ranks' rows: [size * rows, ...]."""
    if not group:
        return there(x)
    if not x.numel():
        return there(x.new_empty((x.shape[0] * size, *x.shape[1:])))
    y = _ops.all_gather_into_tensor(x.contiguous(), size, group)
    return partial(_ops.wait_tensor, y)


def start_scatter(x: Tensor, group: str, size: int) -> Pending:
    """Begin to sum over the ranks and keep the own part of the rows: [rows / size, ...]."""
    if not group:
        return there(x)
    if not x.numel():
        return there(x.new_empty((x.shape[0] // size, *x.shape[1:])))
    y = _ops.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
    return partial(_ops.wait_tensor, y)


def exchange(x: Tensor, group: str, size: int) -> Tensor:
    """Send block j of the rows to rank j; block i of the result comes from rank i."""
    if not group or not x.numel():
        return x
    splits = [x.shape[0] // size] * size
    y = _ops.all_to_all_single(x.contiguous(), splits, splits, group)
    return cast(Tensor, _ops.wait_tensor(y))
