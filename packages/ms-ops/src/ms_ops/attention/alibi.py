"""ALiBi: a head lowers the score of a key by its slope times the distance to the query.

Source: O. Press, N. Smith, M. Lewis, "Train short, test long", ICLR 2022.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice, fail

Form = Literal["abs", "signed", "sqrt", "key"]
FORMS: tuple[Form, ...] = ("abs", "signed", "sqrt", "key")


def alibi_slopes(
    heads: int, *, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return fp32 slopes of heads [start, stop) of a model with `heads` heads.

    A power of two n has the slopes 2^(-8 i / n), i = 1 ... n. Other numbers take those of the next
    lower power of two, then every second slope of twice that power.

    Args:
        heads: number of heads of the whole model, before any tensor parallelism.
        start: first head that is wanted: a rank of a tensor-parallel group has a slice.
        stop: the one after the last, None for all.
        device: where the result lives.

    Raises:
        ValueError: no heads, or a slice outside of them.
    """
    stop = heads if stop is None else stop
    if heads < 1:
        fail(ValueError, "alibi_slopes", "heads", heads, "1 or more")
    if not 0 <= start <= stop <= heads:
        fail(ValueError, "alibi_slopes", "start, stop", (start, stop), f"a slice of {heads} heads")
    power = 2 ** int(math.log2(heads))
    values = _geometric(power) + _geometric(2 * power)[0::2]
    return torch.tensor(values[:heads][start:stop], dtype=torch.float32, device=device)


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * i / heads) for i in range(1, heads + 1)]


def alibi_bias(
    slopes: Tensor,
    rows: int,
    keys: int,
    *,
    form: Form = "abs",
    q_start: int = 0,
    kv_start: int = 0,
    causal_fill: bool = False,
) -> Tensor:
    """Return the bias [H, rows, keys] as a tensor, for attention that takes no slopes.

    With d = (j + kv_start) - (i + q_start): "abs" gives -slope |d|, "sqrt" -slope sqrt(|d|),
    "signed" slope d, and "key" slope (j + kv_start) [H, 1, keys], which differs from "signed"
    by a constant a row and so gives the same softmax.

    Args:
        slopes: [H].
        rows: number of queries.
        keys: number of keys.
        form: which of the four.
        q_start: position of the first query.
        kv_start: position of the first key.
        causal_fill: -inf where d > 0; not with "key", which has no rows.

    Raises:
        ValueError: an unknown form, slopes of another shape, or a fill without rows.
    """
    check_choice("alibi_bias", "form", form, FORMS)
    if slopes.dim() != 1:
        fail(ValueError, "alibi_bias", "slopes", tuple(slopes.shape), "[heads]")
    if causal_fill and form == "key":
        fail(ValueError, "alibi_bias", "causal_fill", "form 'key'", "a form with rows")
    j = torch.arange(keys, device=slopes.device) + kv_start
    slope = slopes.view(-1, 1, 1)
    if form == "key":
        return slope * j
    d = (j - torch.arange(rows, device=slopes.device).unsqueeze(1) - q_start).to(slopes.dtype)
    bias = {"abs": lambda: -slope * d.abs(), "sqrt": lambda: -slope * d.abs().sqrt()}.get(
        form, lambda: slope * d
    )()
    return bias.masked_fill(d > 0, -math.inf) if causal_fill else bias
