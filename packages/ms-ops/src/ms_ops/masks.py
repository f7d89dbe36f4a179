"""Which keys a query may attend to, as a few numbers instead of a matrix.

A `MaskSpec` is plain data: it says what a mask is, whatever the lengths. It becomes a dense tensor
(`dense`), the visibility of one block of the score matrix (`visibility`), or the arguments of
Ascend's fused attention (`npu_form`), which knows structured masks by a mode and a small
triangle of fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, fail

Align = Literal["lower_right", "upper_left"]
ALIGNS: tuple[Align, ...] = ("lower_right", "upper_left")
# What fused kernels take for "no bound": larger than any distance.
UNBOUNDED = 2**31 - 1
COMPRESSED = 2048


@dataclass(frozen=True)
class MaskSpec:
    """A band of the score matrix, and a prefix that every query sees.

    In one sequence of n queries and m keys, query i sees key j where

        -left <= d <= right   or   j + kv_start < prefix
        d = (j + kv_start) - (i + q_start)      aligned to the upper left
        d = j - i - (m - n)                     aligned to the lower right

    Attributes:
        left: how many keys before its own a query sees; None for all. May be negative.
        right: how many keys after its own a query sees; None for all, 0 for causal.
        align: which corner of the matrix the diagonal d = 0 ends in or starts from.
        prefix: how many first keys all queries of a sequence see: one number a sequence of the
            batch, or one for all; empty for none.
        q_start: position of the first query in a longer sequence (upper left only).
        kv_start: position of the first key likewise.
        edge: "first" or "last": this sequence of the batch has a band of its own, "" for none.
        edge_left: the left bound of that sequence.
        edge_right: its right bound.

    Raises:
        ValueError: an unknown alignment or edge, or a negative prefix.
    """

    left: int | None = None
    right: int | None = None
    align: Align = "upper_left"
    prefix: tuple[int, ...] = ()
    q_start: int = 0
    kv_start: int = 0
    edge: Literal["", "first", "last"] = ""
    edge_left: int | None = None
    edge_right: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without lengths."""
        check_choice("MaskSpec", "align", self.align, ALIGNS)
        check_choice("MaskSpec", "edge", self.edge, ("", "first", "last"))
        if any(p < 0 for p in self.prefix):
            fail(ValueError, "MaskSpec", "prefix", self.prefix, "numbers of 0 or more")

    @classmethod
    def causal(cls, align: Align = "lower_right") -> MaskSpec:
        """Return the mask under which no query sees a key after it."""
        return cls(right=0, align=align)

    @property
    def kind(self) -> Literal["full", "causal", "band", "prefix"]:
        """What the mask is: the simplest of the forms that describes it."""
        if self.prefix:
            return "prefix"
        if self.edge or self.left is not None or self.right not in (None, 0):
            return "band"
        return "full" if self.right is None else "causal"

    def bounds(self, sequence: int = 0, sequences: int = 1) -> tuple[int, int]:
        """Return (left, right) of a sequence of the batch relative to j - i of its corner.

        `UNBOUNDED` stands for None. Starting positions are folded in, so that with
        c = 0 (upper left) or m - n (lower right), -left <= j - i - c <= right.
        """
        odd = {"first": 0, "last": sequences - 1}.get(self.edge) == sequence
        left, right = (self.edge_left, self.edge_right) if odd else (self.left, self.right)
        shift = self.kv_start - self.q_start if self.align == "upper_left" else 0
        low = UNBOUNDED if left is None else left + shift
        return low, UNBOUNDED if right is None else right - shift

    def prefixes(self) -> tuple[int, ...]:
        """Return the prefix of each sequence, counted from the first key of the call."""
        return tuple(max(0, p - self.kv_start) for p in self.prefix)

    def dense(
        self,
        rows: int,
        keys: int,
        device: torch.device | str = "cpu",
        *,
        sequence: int = 0,
        sequences: int = 1,
    ) -> Tensor:
        """Return bool [rows, keys] of one sequence, True where a query may attend."""
        left, right = self.bounds(sequence, sequences)
        d = torch.arange(keys, device=device) - torch.arange(rows, device=device).unsqueeze(1)
        d = d - (keys - rows if self.align == "lower_right" else 0)
        seen = (d >= -left) & (d <= right)
        if self.prefix:
            first = self.prefixes()[sequence if len(self.prefix) > 1 else 0]
            seen = seen | (torch.arange(keys, device=device) < first)
        return seen

    def keys_of(
        self, rows: tuple[int, int], shape: tuple[int, int], sequence: int = 0, sequences: int = 1
    ) -> tuple[int, int]:
        """Return the interval of keys outside of which queries [rows) of a sequence see nothing.

        Args:
            rows: first query and the one after the last.
            shape: numbers of queries and of keys of the sequence.
            sequence: which sequence of the batch.
            sequences: how many there are.
        """
        left, right = self.bounds(sequence, sequences)
        corner = shape[1] - shape[0] if self.align == "lower_right" else 0
        low = max(0, rows[0] + corner - left)
        high = min(shape[1], rows[1] + corner + right)
        if self.prefix:
            first = self.prefixes()[sequence if len(self.prefix) > 1 else 0]
            low, high = (0, max(high, min(first, shape[1]))) if first else (low, high)
        return low, max(low, high)

    def visibility(
        self, rows: tuple[int, int], keys: tuple[int, int], shape: tuple[int, int]
    ) -> Literal["empty", "full", "causal", "band"]:
        """Say what a block of the score matrix of one sequence sees.

        "causal" is a square block whose diagonal is the mask's: a plain causal call serves it.

        Args:
            rows: first query of the block and the one after the last.
            keys: first key and the one after the last.
            shape: numbers of queries and of keys of the whole sequence.
        """
        left, right = self.bounds()
        corner = shape[1] - shape[0] if self.align == "lower_right" else 0
        nearest = keys[0] - (rows[1] - 1) - corner
        farthest = keys[1] - 1 - rows[0] - corner
        prefix = self.prefixes()[0] if self.prefix else 0
        if rows[0] >= rows[1] or keys[0] >= keys[1]:
            return "empty"
        if keys[1] <= prefix or (-left <= nearest and farthest <= right):
            return "full"
        if keys[0] >= prefix and (farthest < -left or nearest > right):
            return "empty"
        square = rows[1] - rows[0] == keys[1] - keys[0]
        on_diagonal = keys[0] - rows[0] - corner == right and -left <= nearest
        return "causal" if square and on_diagonal and keys[0] >= prefix else "band"


@dataclass(frozen=True)
class NpuMask:
    """The mask arguments of Ascend's fused attention.

    Attributes:
        sparse_mode: 0, 2, 3, 4, 6, 7 or 8; with mode 0 and no mask attention is dense.
        pre_tokens: bound to the left of the diagonal, read by modes 4, 7 and 8.
        next_tokens: bound to the right.
        prefix: one number a sequence, or None.
        atten_mask: the compressed mask, True where a query may NOT attend, or None.
    """

    sparse_mode: int
    pre_tokens: int = UNBOUNDED
    next_tokens: int = UNBOUNDED
    prefix: tuple[int, ...] | None = None
    atten_mask: Tensor | None = None


def from_sparse_mode(
    mode: int,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    prefix: Sequence[int] | None = None,
) -> MaskSpec:
    """Return the mask that a mode of Ascend's fused attention stands for.

    0: the band of pre and next tokens from the upper left, 1: all, 2 and 3: causal from the upper
    left and the lower right, 4: the band from the lower right, 5 and 6: causal from the lower
    right and a prefix, 7: causal from the lower right, the last sequence of a pack a band, 8:
    causal from the upper left, the first sequence a band. A mask tensor that comes with mode 0
    or 1 is combined with this one by "and".

    Args:
        mode: 0 to 8.
        pre_tokens: how many keys before its own a query sees, 2147483647 for all.
        next_tokens: how many after its own.
        prefix: for modes 5 and 6, one number a sequence.

    Raises:
        ValueError: an unknown mode, or a prefix that is missing or has no use.
    """
    check_choice("from_sparse_mode", "mode", mode, range(9))
    if (mode in (5, 6)) != bool(prefix):
        need = "one number a sequence for modes 5 and 6, and None for the others"
        fail(ValueError, "from_sparse_mode", "prefix", f"{prefix} with mode {mode}", need)
    left, right = (None if t >= UNBOUNDED else t for t in (pre_tokens, next_tokens))
    causal = MaskSpec.causal("upper_left" if mode in (2, 8) else "lower_right")
    table = {
        0: MaskSpec(left, right),
        1: MaskSpec(),
        4: MaskSpec(left, right, "lower_right"),
        5: MaskSpec(right=0, align="lower_right", prefix=tuple(prefix or ())),
        7: MaskSpec(right=0, align="lower_right", edge="last", edge_left=left, edge_right=right),
        8: MaskSpec(right=0, edge="first", edge_left=left, edge_right=right),
    }
    return table.get(5 if mode == 6 else mode, causal)


def npu_form(spec: MaskSpec, device: torch.device | str = "cpu") -> NpuMask:
    """Return the arguments by which Ascend's fused attention builds a mask by itself.

    Raises:
        ValueError: the mask is none of the kernel's modes; a dense mask (`MaskSpec.dense`,
            inverted) with mode 1 serves it.
    """
    plain = spec.q_start == spec.kv_start == 0
    right_down = spec.align == "lower_right"
    outer = (spec.left, spec.right) == (None, 0)
    if plain and spec.kind == "full":
        return NpuMask(0)
    if plain and spec.kind == "causal":
        return NpuMask(3 if right_down else 2, atten_mask=compressed_causal(device))
    if plain and spec.prefix and right_down and outer and not spec.edge:
        return NpuMask(6, prefix=spec.prefix, atten_mask=compressed_prefix(device))
    if plain and spec.edge and outer and (spec.edge == "last") == right_down and not spec.prefix:
        edge = MaskSpec(spec.edge_left, spec.edge_right).bounds()
        return NpuMask(7 if right_down else 8, *edge, atten_mask=compressed_causal(device))
    if not right_down or spec.prefix or spec.edge:
        need = "full, causal, a band or a prefix aligned to the lower right; else a dense mask"
        fail(ValueError, "npu_form", "spec", spec, need)
    return NpuMask(4, *spec.bounds(), atten_mask=compressed_causal(device))


def compressed_causal(device: torch.device | str = "cpu") -> Tensor:
    """Return bool [2048, 2048], True above the diagonal: what modes 2, 3, 4, 7 and 8 read.

    One tensor a device, made at the first call; do not write into it.
    """
    return _kept(str(torch.device(device)), False)


def compressed_prefix(device: torch.device | str = "cpu") -> Tensor:
    """Return bool [3072, 2048] for mode 6: the triangle, and 1024 rows whose right half is masked.

    One tensor a device, made at the first call; do not write into it.
    """
    return _kept(str(torch.device(device)), True)


_masks: dict[tuple[str, bool], Tensor] = {}


def _kept(device: str, prefix: bool) -> Tensor:
    # Inside a tracer factories return its own tensors, which must not outlive it.
    if type(torch.empty(0, device=device)) is not Tensor:
        return _compressed(device, prefix)
    key = (device, prefix)
    if key not in _masks:
        _masks[key] = _compressed(device, prefix)
    return _masks[key]


def _compressed(device: str, prefix: bool) -> Tensor:
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)
    if not prefix:
        return triangle
    below = torch.zeros(COMPRESSED // 2, COMPRESSED, dtype=torch.bool, device=device)
    below[:, COMPRESSED // 2 :] = True
    return torch.cat((triangle, below))
