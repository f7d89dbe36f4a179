"""Calls of the NPU backends on the real torch_npu, with tensors that have shapes but no data.

Under FakeTensorMode torch_npu's own schemas and shape functions answer. `ContractMode` stands where
our custom ops are dispatched: it runs the NPU kernel's code, compares what comes out with what our
fakes promise, and notes which of torch_npu's operators were called.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ms_ops import registry, testing
from ms_ops.attention.starts import note_ends
from ms_ops.opdef import NAMESPACE
from ms_ops.opdef import OPERATORS as DEFINED
from ms_ops.testing.npu.attention import KERNELS
from support.npu_backends import noted_lines
from support.npu_samples import all_samples

VENDOR = ("npu", "atb")
# Operators of torch itself that a backend asks for because torch_npu has kernels of its own.
WATCHED = ("aten::_fused_adamw_", "aten::_foreach_lerp_", "aten::addmm")
# Operators whose shape functions are wrong in torch_npu 2.13.0 (one raises TypeError always, the
# other mistakes heads for queries with BSND), or that have none.
NO_SHAPES = {
    name: KERNELS[name]
    for name in ("npu::npu_fusion_attention_v2", "npu::npu_fusion_attention_grad_v2")
} | {"atb::_npu_matmul_add_fp32": lambda x, weight, c: None}


class ContractMode(TorchDispatchMode):
    """Runs NPU kernels in the place of our custom ops; `called` are torch_npu's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        op, direction = func._opname, "forward"
        if op not in DEFINED:
            op, direction = op.removesuffix("_backward"), "backward"
        promised = func(*args)
        with _Calls(self.called), torch._C._AutoDispatchBelowAutograd():
            got = getattr(registry.kernel(op, "npu"), direction)(*args[:-1])
        for mine, other in zip(_tuple(got), _tuple(promised), strict=True):
            _assert_same(f"{func}", mine, other)
        return promised


class _Calls(TorchDispatchMode):
    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in VENDOR or func._schema.name in WATCHED:
            self.called.append(func._schema.name)
        # The arguments have met the schema by now.
        shapes = NO_SHAPES.get(func._schema.name, func)
        return shapes(*args, **(kwargs or {}))


def run_samples(op: str, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Run forward and backward of all samples of an operator that its NPU backend takes.

    Returns how many there were, and torch_npu's operators used.
    """
    contract, count = ContractMode(), 0
    more = all_samples(dtype) if op == "attention" else ()
    for sample in (*testing.OPERATORS[op].samples(dtype, "cpu"), *more):
        with FakeTensorMode():
            args = [_on_npu(a) for a in sample.args]
            kwargs = {k: _on_npu(a) for k, a in sample.kwargs.items()}
            for name in ("cu_seqlens_q", "cu_seqlens_k"):
                if name in kwargs:  # The kernel wants these numbers on the host.
                    note_ends(kwargs[name], sample.kwargs[name].tolist()[1:])
            fake = testing.Sample(sample.name, tuple(args), kwargs, sample.differentiable)
            if testing.declines(op, fake, "npu"):
                continue
            count += 1
            leaves = [
                (kwargs if isinstance(i, str) else args)[i].requires_grad_()
                for i in sample.differentiable
            ]
            with contract:
                forward_and_backward(testing.OPERATORS[op].function, args, kwargs, leaves)
    return count, contract.called


def forward_and_backward(
    function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], leaves: list[Tensor]
) -> None:
    """Call a function and its backward."""
    outputs = [o for o in _tuple(function(*args, **kwargs)) if o is not None and o.requires_grad]
    if leaves:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])


# Where children note the lines of the backends that they run; None: nowhere.
lines_folder: Path | None = None


def in_child(function: Callable[[], object]) -> str:
    """Run a function in a forked child; return "" or its traceback, or how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            with noted_lines(lines_folder) if lines_folder else nullcontext():
                function()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode()[-60000:])
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return text if status == 0 else f"ended with status {status}\n{text}"


def _on_npu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")


def _tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _assert_same(where: str, mine: Any, other: Any) -> None:
    if mine is None or other is None:
        assert mine is other, f"{where}: {mine} and {other}"
        return
    for what in ("shape", "dtype", "device"):
        got, need = getattr(mine, what), getattr(other, what)
        assert got == need, f"{where}: {what} of the NPU backend {got}, of our fake {need}"
    assert mine.is_contiguous() == other.is_contiguous(), f"{where}: contiguity differs"
