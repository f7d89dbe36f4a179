"""fp32 masters of bf16 parameters in two bytes a parameter beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import refuse
from .bits import ROUNDINGS, Rounding, join, split_

# Elements whose fp32 copy exists at one time: 64 MiB.
BLOCK = 1 << 24


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of parameter number `index`."""

    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.stop - self.start


class PackedMaster:
    """The high halves are the parameters themselves, the low halves are kept here.

    A master costs 2 bytes beside the 2 of its weight, instead of 4 beside 2. The first masters are
    the weights as they are.

    Args:
        params: bf16 parameters or slices of flat buffers, contiguous, none overlapping another.
        rounding: how a weight follows from its master: "rna" rounds halves away from zero,
            "rne" is `master.to(torch.bfloat16)` and costs a few bytes a million parameters more,
            and on an accelerator one wait a block to learn how many ties there are.
        block: at most so many elements have an fp32 copy at one time.

    Raises:
        MemoryFeatureError: E-M40, a parameter that is not bf16 or not contiguous, or that shares
            memory with another.
        ValueError: an unknown rounding, or a block below 1.
    """

    def __init__(
        self, params: Iterable[Tensor], *, rounding: Rounding = "rna", block: int = BLOCK
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"PackedMaster: rounding: got {rounding!r}, need one of {ROUNDINGS}")
        if block < 1:
            raise ValueError(f"PackedMaster: block: got {block}, need at least 1")
        self.params = list(params)
        self.rounding = rounding
        self.block = block
        _check_params(self.params)
        self.residues = [
            torch.zeros(p.numel(), dtype=torch.int16, device=p.device) for p in self.params
        ]
        self._ties: dict[Slice, Tensor] = {}
        self._versions = [p._version for p in self.params]
        self._families = _families(self.params)
        self._joined = False

    def groups(self, chosen: Sequence[int] | None = None) -> Iterator[list[Slice]]:
        """Yield lists of slices of at most `block` elements together, of the chosen parameters."""
        together: list[Slice] = []
        room = self.block
        for index in range(len(self.params)) if chosen is None else chosen:
            for piece in self._slices(index):
                if together and piece.numel > room:
                    yield together
                    together, room = [], self.block
                together.append(piece)
                room -= piece.numel
        if together:
            yield together

    def join(self, piece: Slice) -> Tensor:
        """Return the masters of a slice, a new fp32 tensor [numel].

        Raises:
            MemoryFeatureError: E-M40, the parameter was written since its masters were stored.
        """
        weight = self.params[piece.index]
        if weight._version != self._versions[piece.index]:
            refuse(
                "E-M40",
                f"parameter {piece.index} of shape {tuple(weight.shape)}",
                "write through `masters()`, or call `adopt_weights()` after loading weights",
            )
        out = torch.empty(piece.numel, dtype=torch.float32, device=weight.device)
        return join(*self._halves(piece), self._ties.get(piece), out)

    def split_(self, piece: Slice, master: Tensor) -> None:
        """Store the masters of a slice: writes weight and residue.

        Args:
            piece: which slice, one of `groups()`.
            master: fp32 [numel], contiguous.
        """
        ties = split_(master, *self._halves(piece), self.rounding)
        if ties is not None:
            self._ties[piece] = ties.to(torch.int32)
        self._note_version(piece.index)

    def adopt_weights(self) -> None:
        """Take the weights as the masters: what they were rounded from is forgotten."""
        for index, residue in enumerate(self.residues):
            residue.zero_()
            self._versions[index] = self.params[index]._version
        self._ties.clear()

    @contextmanager
    def masters(self) -> Iterator[list[Tensor]]:
        """Yield all masters, fp32 in the shapes of the parameters; what is written is stored.

        All of them exist at once, for checkpoints and inspection; an exception stores nothing.

        Raises:
            MemoryFeatureError: E-M41, entered twice.
        """
        if self._joined:
            refuse("E-M41", "masters() inside masters()", "leave the first before the second")
        self._joined = True
        try:
            found = [self.master(index) for index in range(len(self.params))]
            yield found
            for index, master in enumerate(found):
                self.set_master(index, master)
        finally:
            self._joined = False

    def master(self, index: int) -> Tensor:
        """Return a copy of one parameter's masters, fp32 in its shape."""
        parts = [self.join(piece) for piece in self._slices(index)]
        shape = self.params[index].shape
        if not parts:
            return torch.empty(shape, dtype=torch.float32, device=self.params[index].device)
        return torch.cat(parts).view(shape)

    def set_master(self, index: int, master: Tensor) -> None:
        """Store one parameter's masters, fp32 of its shape, any strides."""
        flat = master.detach().to(torch.float32).reshape(-1).contiguous()
        for piece in self._slices(index):
            self.split_(piece, flat[piece.start : piece.stop])

    def nbytes(self) -> int:
        """Return the bytes held beside the parameters."""
        held = [*self.residues, *self._ties.values()]
        return sum(t.numel() * t.element_size() for t in held)

    def _note_version(self, index: int) -> None:
        # Slices of one buffer have one version counter.
        for member in self._families[index]:
            self._versions[member] = self.params[member]._version

    def _slices(self, index: int) -> Iterator[Slice]:
        numel = self.params[index].numel()
        for start in range(0, numel, self.block):
            yield Slice(index, start, min(numel, start + self.block))

    def _halves(self, piece: Slice) -> tuple[Tensor, Tensor]:
        flat = self.params[piece.index].detach().view(-1)
        part = slice(piece.start, piece.stop)
        return flat[part], self.residues[piece.index][part]


def _families(params: Sequence[Tensor]) -> list[list[int]]:
    """Return, for each parameter, the numbers of those in the same storage."""
    members: dict[int, list[int]] = {}
    keys = [p.untyped_storage().data_ptr() for p in params]
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return [members[key] for key in keys]


def _check_params(params: Sequence[Tensor]) -> None:
    spans = []
    for index, p in enumerate(params):
        where = f"parameter {index} of shape {tuple(p.shape)}"
        if p.dtype is not torch.bfloat16:
            refuse("E-M40", f"{where} is {p.dtype}", "pack bf16 parameters only")
        if not p.is_contiguous():
            refuse("E-M40", f"{where} is not contiguous", "pack contiguous parameters")
        if p.numel():
            start = p.data_ptr()
            spans.append((p.device, start, start + 2 * p.numel(), where))
    spans.sort(key=lambda span: (str(span[0]), span[1]))
    for first, second in pairwise(spans):
        if first[0] == second[0] and first[2] > second[1]:
            refuse("E-M40", f"{second[3]} shares memory with {first[3]}", "name it once")
