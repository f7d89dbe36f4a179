"""Who is known to hold memory: modules, optimizers and inputs that the user named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ms_profile.memory.census import Kind, tensors_of

__all__ = ["Owners"]


class Owners:
    """What the given and the excluded hold at this moment, by kind.

    Args:
        given: modules, tensors, and optimizers: anything with `param_groups` and `state`.
        excluded: modules and tensors whose own storages do not count; their gradients do.

    Raises:
        TypeError: something else is among them.
    """

    def __init__(self, given: Sequence[Any], excluded: Sequence[Any]) -> None:
        for each in (*given, *excluded):
            if not isinstance(each, nn.Module | Tensor) and not _is_optimizer(each):
                raise TypeError(
                    f"MemoryMeter got {type(each).__name__}; it takes modules, optimizers and "
                    "tensors: pass the parts of a container one by one"
                )
        self._given = tuple(given)
        self._excluded = tuple(excluded)

    def given(self) -> Iterator[tuple[Tensor, Kind]]:
        """What the given hold; of two kinds of a tensor the later one is right."""
        modules = [each for each in self._given if isinstance(each, nn.Module)]
        for each in self._given:
            if isinstance(each, Tensor):
                yield each, "input"
            elif not isinstance(each, nn.Module):
                yield from _of_optimizer(each, masters="optimizer" if modules else "parameter")
        for module in modules:
            for tensor in tensors_of(module):
                yield tensor, "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        for each in self._given:
            yield from _gradients(each)

    def gradients(self) -> Iterator[tuple[Tensor, Kind]]:
        """The gradients of what is excluded."""
        for each in self._excluded:
            yield from _gradients(each)


def _is_optimizer(each: Any) -> bool:
    return hasattr(each, "param_groups") and hasattr(each, "state")


def _of_optimizer(optimizer: Any, masters: Kind) -> Iterator[tuple[Tensor, Kind]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, masters
    for tensor in tensors_of(list(optimizer.state.values())):
        yield tensor, "optimizer"


def _gradients(owner: Any) -> Iterator[tuple[Tensor, Kind]]:
    """Gradients where torch puts them, and where Megatron-like buffers do."""
    if _is_optimizer(owner):
        leaves = [p for group in owner.param_groups for p in group["params"]]
    else:
        leaves = list(tensors_of(owner))
    for leaf in leaves:
        # Asking a non-leaf for its gradient would warn.
        grad = leaf.grad if leaf.is_leaf else None
        for tensor in (grad, getattr(leaf, "main_grad", None)):
            if isinstance(tensor, Tensor):
                yield tensor, "gradient"
