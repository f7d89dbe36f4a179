"""Dropout on attention weights whose mask is a function of the place, not of the order of work.

The entry of query i and key j of a head is dropped when the number that Philox4x32-10 gives for
the counter (i, j / 4, batch and head, offset), word j mod 4, under the key `seed` lies below the
dropout probability. Any block of the score matrix can therefore be drawn alone: in backward, in a
kernel that walks it in another order, or on the rank of a context-parallel group that owns it.

Source of the generator: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Counter word of batch and head: 12 bits for the head, the rest for the batch.
HEAD_BITS = 12


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...], rounds: int = 10) -> list[Tensor]:
    """Return the four words of Philox4x32 for each counter.

    Args:
        counter: four int64 tensors that broadcast, each with values below 2^32.
        key: two int64 tensors that broadcast with them, likewise.
        rounds: 10 is the standard generator.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        low, high = ((k + i * w) & _WORD for k, w in zip((k0, k1), _WEYL, strict=True))
        # The product wraps around in int64; its bits are right, and the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ low,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ high,
            p0 & _WORD,
        )
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def keep_mask(
    rng: Tensor, p: float, heads: tuple[int, int], rows: Tensor, keys: tuple[int, int], head: int
) -> Tensor:
    """Return bool [B, H, rows, keys], True where an entry of the score matrix stays.

    Args:
        rng: int64 [2], seed and offset.
        p: probability to drop.
        heads: (batch, heads).
        rows: int64 [rows], the position of each query.
        keys: position of the first key and of the one after the last.
        head: number of the first head.
    """
    device = rows.device
    first, last = keys[0] // 4, (keys[1] + 3) // 4
    words = torch.arange(first, last, device=device)
    place = torch.arange(heads[0], device=device).unsqueeze(1) << HEAD_BITS
    place = place + torch.arange(head, head + heads[1], device=device)
    seed, offset = rng[0], rng[1]
    counter = (rows.view(1, 1, -1, 1), words, place.view(*heads, 1, 1), offset & _WORD)
    drawn = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    values = torch.stack(drawn, -1).flatten(-2)
    start = keys[0] - 4 * first
    return values[..., start : start + keys[1] - keys[0]] >= round(p * 2**32)
