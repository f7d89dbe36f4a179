"""`rms_norm`: root-mean-square normalisation, on any device."""

from __future__ import annotations

from torch import Tensor

import ms_ops


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * gamma; see `ms_ops.rms_norm`.

    Args:
        x: [..., *gamma.shape].
        gamma: one or more trailing dimensions of x.
        epsilon: added to the mean square.
    """
    return ms_ops.rms_norm(x, gamma, epsilon)
