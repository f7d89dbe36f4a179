"""Bytes that a rank holds in every step, whatever is planned."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mindspeed.features.memory.planner.step import gradient_buffers, unwrapped


def static_bytes(chunks: Sequence[Any], optimizer: Any) -> int:
    """Return the bytes of weights, gradients, masters, the optimizer's and random states.

    States that the optimizer makes in its first step count before they are there. On an accelerator
    what lies on the host does not count.

    Args:
        chunks: as Megatron wraps them.
        optimizer: Megatron's; None: there is none.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    found: list[Tensor] = list(get_cuda_rng_tracker().get_states().values())
    for chunk in chunks:
        found += [*chunk.parameters(), *unwrapped(chunk).buffers()]
        found += gradient_buffers(chunk)
        found += [p.grad for p in chunk.parameters() if p.grad is not None]
    inner = list(torch_optimizers(optimizer))
    for one in inner:
        found += _held(one)
    device = next((p.device.type for chunk in chunks for p in chunk.parameters()), "cpu")
    here = [tensor for tensor in found if tensor.device.type == device]
    return _unique(here) + sum(map(_to_come, inner))


def torch_optimizers(optimizer: Any) -> Iterator[Any]:
    """Return the torch optimizers inside Megatron's."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(each, "optimizer", None)
        if inner is not None and hasattr(inner, "state"):
            yield inner


def _held(inner: Any) -> Iterator[Tensor]:
    for parameter in _parameters(inner):
        yield parameter
        yield from (t for t in inner.state.get(parameter, {}).values() if isinstance(t, Tensor))


def _parameters(inner: Any) -> Iterator[Tensor]:
    yield from (p for group in inner.param_groups for p in group["params"])


def _unique(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _to_come(inner: Any) -> int:
    """Return the bytes of states that the first step will make."""
    if hasattr(inner, "peak_bytes"):  # states lie on the host, and pass through in slices
        return int(inner.peak_bytes())
    missing = [p for p in _parameters(inner) if not inner.state.get(p)]
    kinds = {p.dtype for p in missing}
    each = {kind: _state_bytes(inner, kind) for kind in kinds}
    return sum(round(p.numel() * each[p.dtype]) for p in missing)


PROBE = 64  # elements


def _state_bytes(inner: Any, dtype: torch.dtype) -> float:
    """Return the bytes of state an element, found out on a small parameter.

    An optimizer that cannot be made from its own defaults counts as Adam in fp32: 8 bytes.
    """
    parameter = torch.nn.Parameter(torch.zeros(PROBE, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    known = inspect.signature(type(inner)).parameters
    options = {name: value for name, value in inner.defaults.items() if name in known}
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        probe = type(inner)([parameter], **options)
        probe.step()
        states = probe.state[parameter].values()
        nbytes: int = sum(s.nbytes for s in states if _is_state(s, parameter))
        return nbytes / PROBE
    return 8.0


def _is_state(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
