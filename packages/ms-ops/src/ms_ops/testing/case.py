"""What a test of one operator is made of: calls to serve, calls to refuse, how to judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Sample:
    """One call: its arguments, and which are differentiated (by position, or by keyword)."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[int | str, ...] = (0,)


@dataclass(frozen=True)
class ErrorSample:
    """One call that must raise `kind` with a message that contains `message`."""

    name: str
    args: tuple[Any, ...]
    kind: type[Exception]
    message: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def maker(dtype: torch.dtype, device: str) -> Make:
    """Return a function that makes normal tensors of a shape, the same ones every time."""
    generator = torch.Generator().manual_seed(20)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        wide = torch.randn(shape, generator=generator, dtype=torch.float64)
        return wide.to(dtype).to(device)

    return make


@dataclass(frozen=True)
class OpTest:
    """How one operator is tested.

    Attributes:
        name: the operator's registered name.
        function: the public function that is called.
        samples: `samples(dtype, device)` yields the calls that every backend must serve.
        errors: `errors()` yields the calls that every backend must refuse, with the same message.
        plain: what eager torch code commonly writes, in the dtype of its inputs.
        outputs: tolerance class of each output.
        gradients: tolerance class of each gradient, by the argument's position or keyword.
        traced: samples that go through torch's tracers, which take seconds each.
        resized: two samples that a function compiled with dynamic shapes serves one by one.
        grows: the dimension, by the argument's position, that may have any size in one graph.
        differentiable_outputs: outputs that gradients flow back from; None where one is absent.
        mutates: positions of the arguments that the function writes into and returns.
    """

    name: str
    function: Callable[..., Any]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    errors: Callable[[], Iterator[ErrorSample]]
    plain: Callable[..., Any]
    outputs: tuple[str, ...]
    gradients: Mapping[int | str, str]
    traced: tuple[str, ...]
    resized: tuple[str, str]
    grows: Mapping[int, int]
    differentiable_outputs: tuple[int, ...] = (0,)
    mutates: tuple[int, ...] = ()
