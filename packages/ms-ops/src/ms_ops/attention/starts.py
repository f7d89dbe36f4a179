"""Starts of packed sequences: a tensor for kernels, numbers for who needs them on the host."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known = WeakTensorKeyDictionary()


def sequence_starts(lengths: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Return where packed sequences start, for `cu_seqlens_q` and `cu_seqlens_k`.

    Kernels that want these numbers on the host (Ascend's) then need not wait for the device.

    Args:
        lengths: tokens of each sequence.
        device: where the tensor shall be.

    Returns:
        int32 [N + 1], from 0; not to be written to.
    """
    starts = [0, *itertools.accumulate(lengths)]
    made = torch.tensor(starts, dtype=torch.int32).to(device)
    note_ends(made, starts[1:])
    return made


def ends_of(starts: Tensor) -> list[int]:
    """Return where packed sequences end: the starts without the leading 0, on the host.

    They are read once for a tensor, so that the layers of a model wait for the device once a step.
    """
    if starts not in _known or _known[starts][0] != starts._version:
        note_ends(starts, starts.tolist()[1:])
    ends: list[int] = _known[starts][1]
    return ends


def note_ends(starts: Tensor, ends: list[int]) -> None:
    """Tell what a tensor of starts holds, so that nobody has to read it."""
    _known[starts] = (starts._version, ends)
