"""What the Triton backends of all families share.

A kernel is a plain function under `@jit`; it becomes Triton's at its first launch, which is when
triton is imported. Under torch.compile a launch is recorded as a node that the compiler sees.

Triton's interpreter (TRITON_INTERPRET=1, read by triton too) runs kernels on CPU tensors, slowly:
then the backend is the last one asked, so that it runs where it is named. Nothing can be recorded
there: the portable functions serve what is traced.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .registry import Backend, Facts, Kernel

PRIORITY = 20
INTERPRETED_PRIORITY = 110
INTERPRETER = "TRITON_INTERPRET"
# Elements of a tile; the interpreter takes large ones, as each program costs it milliseconds.
TILE = 4096
INTERPRETED_TILE = 1 << 18
# The widest row that a program holds in registers.
WIDEST = 1 << 16


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter."""
    return os.environ.get(INTERPRETER, "").lower() in ("1", "true", "on", "yes", "y")


@cache
def available() -> str | None:
    """Return None when triton is installed, else the reason."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def declines(facts: Facts) -> str | None:
    """Verdict of a kernel on the device of a call."""
    if facts.device == "cuda" or (facts.device == "cpu" and interpreted()):
        return None
    if facts.device == "cpu":
        return f"tensors on cpu, need cuda, or {INTERPRETER}=1"
    if facts.device != "npu":
        return f"tensors on {facts.device}, need cuda"
    if not _for_ascend():
        return "tensors on npu, need the package triton-ascend"
    return f"Ascend has no {facts.dtype}" if facts.dtype is torch.float64 else None


@cache
def _for_ascend() -> bool:
    return any(d.name.lower() == "triton-ascend" for d in importlib.metadata.distributions())


class Jit:
    """A Triton kernel that is made at its first launch."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self._made: Any = None

    def made(self) -> Any:
        """Return Triton's kernel."""
        if self._made is None:
            # Triton looks `tl` up among the globals of the function.
            self.function.__globals__["tl"] = importlib.import_module("triton.language")
            self._made = importlib.import_module("triton").jit(self.function)
        return self._made

    def launch(self, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
        """Run on a grid of programs, or record that in a trace."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if traced(*tensors):
            torch.library.wrap_triton(self.made())[grid](*args, **options)
            return
        if interpreted():
            self._interpret(grid, args, options)
            return
        with _on(tensors[0].device):
            self.made()[grid](*args, **options)

    def _interpret(
        self, grid: tuple[Any, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        # The interpreter cuts bf16 off instead of rounding: torch rounds fp32 copies.
        low = {id(a): a for a in args if isinstance(a, Tensor) and a.dtype is torch.bfloat16}
        wide = {key: _float(tensor) for key, tensor in low.items()}
        self.made()[grid](*(wide.get(id(a), a) for a in args), **options)
        for key, tensor in low.items():
            if not torch.equal(tensor.float(), wide[key]):
                tensor.copy_(wide[key])


def jit(function: Callable[..., None]) -> Jit:
    """Mark a function as a Triton kernel."""
    return Jit(function)


def traced(*tensors: Tensor) -> bool:
    """Say whether any tensor has no values yet."""
    return any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in tensors)


def backend(
    kernels: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]], otherwise: Backend
) -> Backend:
    """Return the record of a family; `otherwise` serves empty tensors and what is too wide."""
    made = {}
    for op, (forward, backward) in kernels.items():
        spare = otherwise.kernels[op]
        assert spare.backward is not None
        made[op] = Kernel(
            _guarded(forward, spare.forward), _guarded(backward, spare.backward), declines
        )
    return Backend("triton", INTERPRETED_PRIORITY if interpreted() else PRIORITY, made, available)


def _guarded(run: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        cannot = any(t.numel() == 0 for t in tensors) or (interpreted() and traced(*tensors))
        return otherwise(*args) if cannot else run(*args)

    return call


def rows_of(x: Tensor, width: Any) -> Tensor:
    """View a tensor as [rows, width] with neighbouring columns; copies if it must."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def power_of_two(size: Any) -> int:
    """Return the least power of two that is not smaller; fixes a symbolic size."""
    return 1 << (int(size) - 1).bit_length()


def tile(width: Any, rows: Any = None) -> tuple[int, int]:
    """Return (rows, columns) of a tile that holds whole rows of a width.

    Args:
        width: columns.
        rows: how many rows there are, where that is known.
    """
    columns = power_of_two(width)
    most = max(1, (INTERPRETED_TILE if interpreted() else TILE) // columns)
    if isinstance(rows, int):
        most = min(most, power_of_two(max(rows, 1)))
    return most, columns


def blocks(size: Any, block: int) -> Any:
    """Return how many blocks a size takes."""
    return (size + block - 1) // block


def share(blocks: Any, most: int) -> int:
    """Return how many programs share blocks between them."""
    return min(most, blocks) if isinstance(blocks, int) else most


def pointers(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Return contiguous tensors: a kernel takes a pointer also where it reads nothing."""
    return [stand_in if t is None else t.contiguous() for t in tensors]


def warps(elements: int) -> int:
    """Return how many warps share a tile."""
    return 4 if elements <= 4096 else 8 if elements <= 16384 else 16


def wide(dtype: torch.dtype) -> bool:
    """Say whether the arithmetic runs in fp64."""
    return dtype is torch.float64


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever that of its tensors."""
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


def _float(x: Tensor) -> Tensor:
    """Return an fp32 copy with the same strides, also of an expanded tensor."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent,), (1,)).float().as_strided(x.shape, x.stride())
