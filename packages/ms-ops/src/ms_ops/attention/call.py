"""The arguments of the attention operator beyond q, k and v, as its kernels receive them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..masks import UNBOUNDED

SCHEMA = (
    "Tensor? bias, Tensor? sink, Tensor? slopes, Tensor? mask, Tensor? cu_q, Tensor? cu_k,"
    " Tensor? rng, int[] window, str corner, int[] prefix, int[] starts, int slope_shift,"
    " bool root, float bias_factor, float dropout_p, float scale, str layout"
)


class Call(NamedTuple):
    """How the scores of one call are formed; `Call(*rest)` names a kernel's arguments.

    Attributes:
        bias: broadcasts to [B, H, Sq, Sk]; `bias_factor` times it is added to the scaled scores.
        sink: [H], a score without a value that every row also has.
        slopes: fp32 [H] or [B, H], ALiBi: minus slope times the distance is added.
        mask: bool, broadcasts to [B, H, Sq, Sk], True where a query may attend.
        cu_q: int32 [N + 1], where the sequences of a pack start and the last ends (layout thd).
        cu_k: likewise of the keys.
        rng: int64 [2], seed and offset of the dropout.
        window: [left, right] around the diagonal, `UNBOUNDED` for no bound; for a pack with an odd
            sequence [left, right, its left, its right, 0 for the first or -1 for the last].
        corner: "upper_left" or "lower_right", where the diagonal is.
        prefix: how many first keys all queries see, a number a sequence, or one, or none.
        starts: positions of the first query and key and number of the first head, for dropout.
        slope_shift: added to j - i in ALiBi's distance |j - i|.
        root: ALiBi takes the square root of the distance.
        bias_factor: factor of the bias.
        dropout_p: probability to drop a weight.
        scale: factor of q k^T.
        layout: "bshd", "sbhd", "bhsd" or "thd".
    """

    bias: Tensor | None
    sink: Tensor | None
    slopes: Tensor | None
    mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    rng: Tensor | None
    window: list[int]
    corner: str
    prefix: list[int]
    starts: list[int]
    slope_shift: int
    root: bool
    bias_factor: float
    dropout_p: float
    scale: float
    layout: str

    @property
    def causal(self) -> bool:
        """Whether the window is the plain triangle."""
        return list(self.window) == [UNBOUNDED, 0]

    @property
    def banded(self) -> bool:
        """Whether there is a structured mask of any form."""
        return any(bound != UNBOUNDED for bound in self.window) or len(self.window) > 2

    def bounds(self, sequence: int, sequences: int) -> tuple[int, int]:
        """Return (left, right) of one sequence of the batch."""
        if len(self.window) > 2 and sequence == self.window[4] % sequences:
            return self.window[2], self.window[3]
        return self.window[0], self.window[1]


TENSORS = 7  # How many of the fields are tensors: they come first.
