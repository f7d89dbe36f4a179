"""An fp32 number as a bf16 number and 16 bits more, without loss.

Let X be the bits of x as a 32-bit integer, r its low half read as signed, and w the bits of the
bf16 weight as a 16-bit integer:

    w = (X - r) / 2^16                  X = w 2^16 + r

That rounds halves away from zero ("rna"), and is what fused optimizers with stored remainders do.
IEEE rounding ("rne", what `Tensor.to(torch.bfloat16)` does) differs in exact halves above an even
high half: r = -2^15, and w is one less. Which of two x a pair (even w, -2^15) came from is one bit
that no 16-bit residue can hold (65,537 fp32 numbers round to each even bf16 number); it is kept
beside, as the list of the places of such ties, about one in 2^17.

A NaN is cast, never carried into, so that it becomes neither infinity nor zero; which NaN it is may
change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["rna", "rne"]
ROUNDINGS: tuple[Rounding, ...] = ("rna", "rne")
_HALF = -(2**15)


def split_(
    master: Tensor, weights: list[Tensor], residue: Tensor, rounding: Rounding
) -> Tensor | None:
    """Write the weights and the residues of masters.

    Args:
        master: fp32 [n], contiguous.
        weights: bf16, one after another the weights of all n, each contiguous; written.
        residue: int16 [n], written.
        rounding: "rna" or "rne".

    Returns:
        With "rne", int64 [ties], the places whose tie went down to an even weight; else None.
    """
    whole = master.view(torch.int32)
    residue.copy_(whole)  # the low halves: integers wrap
    sizes = [w.numel() for w in weights]
    if rounding == "rne":
        torch._foreach_copy_(weights, master.split(sizes))
        return _ties(whole, residue)
    rounded = master.to(torch.bfloat16)
    bits = rounded.view(torch.int16)
    if master.device.type == "cpu":
        bits[_ties(whole, residue)] += 1
    else:
        # Looking for the few ties would wait for the device.
        bits.add_((residue == _HALF) & (whole & 0x10000 == 0) & ~master.isnan())
    torch._foreach_copy_(weights, rounded.split(sizes))
    return None


def join(weights: list[Tensor], residue: Tensor, ties: Tensor, out: Tensor) -> Tensor:
    """Return the masters that `split_` took apart, in `out`.

    Args:
        weights: bf16, one after another those of all n.
        residue: int16 [n].
        ties: int64, the places that `split_` returned; empty for "rna".
        out: fp32 [n], contiguous, written.
    """
    whole = out.view(torch.int32)
    sizes = [w.numel() for w in weights]
    torch._foreach_copy_(whole.split(sizes), [w.view(torch.int16) for w in weights])
    whole.bitwise_left_shift_(16).add_(residue)
    if ties.numel():
        whole[ties] += 1 << 16
    return out


def _ties(whole: Tensor, residue: Tensor) -> Tensor:
    """Return the places of exact halves above an even high half, NaNs left out."""
    # One pass finds the candidates, one in 2^16; the rest looks at them alone.
    places = (residue == _HALF).nonzero().squeeze(1)
    found = whole[places]
    tied = (found & 0x10000 == 0) & ~found.view(torch.float32).isnan()
    return places[tied]
