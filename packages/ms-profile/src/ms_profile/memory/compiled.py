"""What compiled regions made: they allocate without the dispatcher, so it is found when it is used.

The forward of a region that `torch.compile` made of differentiable code is one autograd node. When
an operator gets a result of such a node, the result and what the node saved are taken into the
books. A region's own temporaries, and what its backward makes, stay unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ms_profile.memory.census import StorageCensus, storages
from ms_profile.memory.made import Made, is_on

__all__ = ["compiled_results"]

_NODE = "CompiledFunctionBackward"


def compiled_results(
    census: StorageCensus, args: Sequence[Any], device: torch.device | None
) -> Sequence[Made]:
    """Storages that a compiled region made and that an operator is the first to show.

    Args:
        census: what is known.
        args: the operator's arguments; lists of tensors are looked into.
        device: see `is_on`.
    """
    found: dict[int, Made] = {}
    for arg in args:
        if isinstance(arg, Tensor):
            _look(census, arg, device, found)
        elif isinstance(arg, (list, tuple)):
            for each in arg:
                if isinstance(each, Tensor):
                    _look(census, each, device, found)
    return list(found.values()) if found else ()


def _look(
    census: StorageCensus, tensor: Tensor, device: torch.device | None, found: dict[int, Made]
) -> None:
    held = census.held
    if all(id(storage) in held for storage in storages(tensor)):
        return
    node = tensor.grad_fn
    if node is None or node.name() != _NODE:
        return
    # Of the user's it saved parameters, which are leaves with gradients, and what is known already.
    saved = (t for t in getattr(node, "saved_tensors", ()) if isinstance(t, Tensor))
    saved = (t for t in saved if not (t.is_leaf and t.requires_grad))
    for each in (tensor, *saved):
        if is_on(each, device):
            for storage in storages(each):
                if id(storage) not in held:
                    found[id(storage)] = each, storage
