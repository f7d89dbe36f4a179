"""The reference formulas compiled by torch.compile, for who asks for the backend "compiled".

The first call of an operator, dtype and number of dimensions takes seconds, so nobody gets it
unasked: its priority is behind that of "portable". Where no C++ compiler is, or the compiler fails,
the portable kernel answers instead, and a warning says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .registry import Backend, Kernel

PRIORITY = 95

_log = logging.getLogger("ms_ops")


@dataclass
class Compiled:
    """A function compiled at its first call, or its stand-in once compiling has failed."""

    formula: Callable[..., Any]
    fallback: Callable[..., Any]
    compiled: Callable[..., Any] | None = field(default=None)

    def __call__(self, *args: Any) -> Any:
        """Run on real tensors; a tracer's tensors go through the formula, for its own compiler."""
        if any(isinstance(a, Tensor) and type(a) is not Tensor for a in args):
            return self.formula(*args)
        if self.compiled is None:
            self.compiled = torch.compile(self.formula, fullgraph=True)
        try:
            with torch.no_grad():
                return self.compiled(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).splitlines()[0]
            _log.warning("compiled: %s cannot be compiled: %s", self.formula.__module__, reason)
            self.compiled = self.fallback
            return self.fallback(*args)


def compiled(ops: Sequence[str], reference: Backend, portable: Backend) -> Backend:
    """Return the backend of a family whose kernels are the reference's, compiled.

    Args:
        ops: operators without sums over many rows, which compiled code adds one after another.
        reference: the backend with the formulas.
        portable: the backend with their stand-ins.
    """
    kernels = {}
    for op in ops:
        kernel, plain = reference.kernels[op], portable.kernels[op]
        backward = None
        if kernel.backward is not None and plain.backward is not None:
            backward = Compiled(kernel.backward, plain.backward)
        kernels[op] = Kernel(Compiled(kernel.forward, plain.forward), backward)
    return Backend("compiled", PRIORITY, kernels)
