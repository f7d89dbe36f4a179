"""fp32 masters of bf16 parameters in two bytes a parameter beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import refuse
from .bits import ROUNDINGS, Rounding, join, split_
from .shards import divided_as, local

# Elements whose fp32 copy exists at one time: 4 MiB stay in a processor's cache, 64 MiB keep an
# accelerator busy.
BLOCKS = {"cpu": 1 << 20}
BLOCK = 1 << 24
# Parameters are cut at multiples of this, so that kernels treat the same elements as a vector's
# tail whatever the block: the bits of a step do not depend on it.
ALIGN = 64


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
        params: bf16 parameters or slices of flat buffers, contiguous, on one device, none
            overlapping another. Of DTensors this rank's parts are packed.
        rounding: how a weight follows from its master: "rna" rounds halves away from zero,
            "rne" is `master.to(torch.bfloat16)` and costs a few bytes in 100,000 parameters more,
            and on an accelerator one wait a block to learn how many ties there are.
        block: at most so many elements have an fp32 copy at one time; None: what suits the device.

    Raises:
        MemoryFeatureError: E-M40, a parameter that is not bf16, not contiguous or on another
            device, or that shares memory with another.
        ValueError: an unknown rounding, or a block below 64.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        rounding: Rounding = "rna",
        block: int | None = None,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"PackedMaster: rounding: got {rounding!r}, need one of {ROUNDINGS}")
        if block is not None and block < ALIGN:
            raise ValueError(f"PackedMaster: block: got {block}, need at least {ALIGN}")
        self.params = list(params)
        self.rounding = rounding
        device = self.params[0].device if self.params else torch.device("cpu")
        self.block = block or BLOCKS.get(device.type, BLOCK)
        self._parts = [local(p).detach() for p in self.params]
        _check_params(self._parts)
        # One buffer for all parameters, so that a step over many small ones is few operations.
        self._offsets = [0, *accumulate(p.numel() for p in self._parts)]
        self.residue = torch.zeros(self._offsets[-1], dtype=torch.int16, device=device)
        # Places in that buffer, ascending.
        self._ties = torch.empty(0, dtype=torch.int64, device=device)
        self._versions = [self._version(index) for index in range(len(self.params))]
        self._families = _families(self._parts)
        self._joined = False

    def runs(self, chosen: Sequence[int] | None = None) -> Iterator[list[Slice]]:
        """Yield lists of slices that follow each other, of at most `block` elements together.

        Args:
            chosen: numbers of parameters, ascending; None for all.
        """
        run: list[Slice] = []
        room = self.block
        for index in range(len(self.params)) if chosen is None else chosen:
            start, numel = 0, self._parts[index].numel()
            while start < numel:
                size = min(numel - start, room)
                size -= size % ALIGN if start + size < numel else 0
                if run and (size == 0 or run[-1].index < index - 1):
                    yield run
                    run, room = [], self.block
                    continue
                run.append(Slice(index, start, start + size))
                room -= size
                start += size
        if run:
            yield run

    def join(self, run: Sequence[Slice]) -> Tensor:
        """Return the masters of slices that follow each other, a new fp32 tensor [elements].

        Raises:
            MemoryFeatureError: E-M40, a parameter was written since its masters were stored.
        """
        for piece in run:
            self._check_version(piece.index)
        start, stop = self._span(run)
        out = torch.empty(stop - start, dtype=torch.float32, device=self.residue.device)
        inside = self._tied(start, stop)
        join(self._weights(run), self.residue[start:stop], self._ties[inside] - start, out)
        return out

    def split_(self, run: Sequence[Slice], masters: Tensor) -> None:
        """Store the masters of slices that follow each other: writes weights and residues.

        Args:
            run: which, as `runs` yields them.
            masters: fp32 [elements], contiguous.
        """
        start, stop = self._span(run)
        ties = split_(masters, self._weights(run), self.residue[start:stop], self.rounding)
        if ties is not None:
            inside = self._tied(start, stop)
            kept = self._ties[: inside.start], ties + start, self._ties[inside.stop :]
            self._ties = torch.cat(kept)
        for piece in run:
            self._note_version(piece.index)

    def adopt_weights(self) -> None:
        """Take the weights as the masters: what they were rounded from is forgotten."""
        self.residue.zero_()
        self._ties = self._ties[:0]
        self._versions = [self._version(index) for index in range(len(self.params))]

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
        self._check_version(index)
        parts = [self.join(run) for run in self.runs([index])]
        device = self.residue.device
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=device)
        return divided_as(flat.view(self._parts[index].shape), self.params[index])

    def set_master(self, index: int, master: Tensor) -> None:
        """Store one parameter's masters, fp32 of its shape, any strides."""
        flat = local(master.detach()).to(torch.float32).reshape(-1).contiguous()
        for run in self.runs([index]):
            self.split_(run, flat[run[0].start : run[-1].stop])
        self._note_version(index)

    def residue_of(self, index: int) -> Tensor:
        """Return the low halves of one parameter's masters, int16 [elements], a view."""
        return self.residue[self._offsets[index] : self._offsets[index + 1]]

    def nbytes(self) -> int:
        """Return the bytes held beside the parameters."""
        held = (self.residue, self._ties)
        return sum(t.numel() * t.element_size() for t in held)

    def _span(self, run: Sequence[Slice]) -> tuple[int, int]:
        first, last = run[0], run[-1]
        return self._offsets[first.index] + first.start, self._offsets[last.index] + last.stop

    def _tied(self, start: int, stop: int) -> slice:
        if self.rounding == "rna":
            return slice(0, 0)
        bounds = torch.tensor([start, stop], device=self._ties.device)
        first, last = torch.searchsorted(self._ties, bounds).tolist()
        return slice(first, last)

    def _weights(self, run: Sequence[Slice]) -> list[Tensor]:
        flat = (self._parts[piece.index].view(-1) for piece in run)
        return [t[piece.start : piece.stop] for t, piece in zip(flat, run, strict=True)]

    def _check_version(self, index: int) -> None:
        if self._version(index) != self._versions[index]:
            refuse(
                "E-M40",
                f"parameter {index} of shape {tuple(self.params[index].shape)}",
                "write through `masters()`, or call `adopt_weights()` after loading weights",
            )

    def _note_version(self, index: int) -> None:
        # Slices of one buffer have one version counter.
        for member in self._families[index]:
            self._versions[member] = self._version(member)

    def _version(self, index: int) -> tuple[int, int]:
        # What is written through a DTensor does not count for its part, and the other way.
        return self.params[index]._version, self._parts[index]._version


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
        if p.device != params[0].device:
            refuse("E-M40", f"{where} is on {p.device}", "pack the parameters of one device")
        if not p.is_contiguous():
            refuse("E-M40", f"{where} is not contiguous", "pack contiguous parameters")
        if p.numel():
            start = p.data_ptr()
            spans.append((start, start + 2 * p.numel(), where))
    spans.sort()
    for first, second in pairwise(spans):
        if first[1] > second[0]:
            refuse("E-M40", f"{second[2]} shares memory with {first[2]}", "name it once")
