"""An fp32 number as a bf16 number and 16 bits more, without loss.

Let h and r be the high and the low half of the bits of x, r read as signed. The bf16 weight is x
rounded, the residue is r:

    weight = h + (r < 0)                x = (weight - (r < 0), r)

That rounds halves away from zero ("rna"), and is what fused optimizers with stored remainders do.
IEEE rounding ("rne", what `Tensor.to(torch.bfloat16)` does) differs in exact halves above an even h
(r = -2^15): weight = h there. Which of the two x a pair (even weight, -2^15) came from is one bit
that no 16-bit residue can hold (65,537 fp32 numbers round to each even bf16 number); it is kept
beside, as the list of the places of such ties, about one in 2^17.

Every NaN becomes the weight 0x7FC0, so that no carry turns it into infinity or zero; it stays a
NaN when joined.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["rna", "rne"]
ROUNDINGS: tuple[Rounding, ...] = ("rna", "rne")
_HALF = -(2**15)
_NAN = 0x7FC0
# Which 16-bit half of an fp32 number comes first in memory.
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


def split_(master: Tensor, weight: Tensor, residue: Tensor, rounding: Rounding) -> Tensor | None:
    """Write the weight and the residue of each master.

    Args:
        master: fp32 [n], contiguous.
        weight: bf16 [n], written.
        residue: int16 [n], written.
        rounding: "rna" or "rne".

    Returns:
        With "rne", int64 [ties], the places whose tie went down to an even weight; else None.
    """
    halves = master.view(torch.int16).view(-1, 2)
    low, high = halves[:, _LOW], halves[:, _HIGH]
    residue.copy_(low)
    bits = weight.view(torch.int16)
    torch.add(high, (low < 0).to(torch.int16), out=bits)
    ties = None
    if rounding == "rne":
        down = (low == _HALF) & (high & 1 == 0)
        ties = down.nonzero().squeeze(1)
        bits[ties] -= 1
    bits.masked_fill_(master.isnan(), _NAN)
    return ties


def join(weight: Tensor, residue: Tensor, ties: Tensor | None, out: Tensor) -> Tensor:
    """Return the masters that `split_` took apart, in `out`.

    Args:
        weight: bf16 [n].
        residue: int16 [n].
        ties: what `split_` returned.
        out: fp32 [n], contiguous, written.
    """
    halves = out.view(torch.int16).view(-1, 2)
    halves[:, _LOW] = residue
    torch.sub(weight.view(torch.int16), (residue < 0).to(torch.int16), out=halves[:, _HIGH])
    if ties is not None:
        halves[ties, _HIGH] += 1
    return out
