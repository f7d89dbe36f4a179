"""Megatron-LM's own profiler (`--use-pytorch-profiler`) beside this project's `--profile-ranks`.

The flag's default is -1, all ranks, for this project's profiler; Megatron-LM's knows no -1 and
means rank 0 by default. A default thus becomes [0], and -1 that is given becomes every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="profile.native",
    level=0,
    doc="Gives Megatron-LM's own profiler the ranks that it understands.",
    when="profile and use_pytorch_profiler",
    packages=(),
    page="docs/profile/profiler.md",
    patches=(
        Patch(
            target="megatron.training.training:train",
            kind="wrap",
            value="mindspeed.features.profile.native:wrap_train",
            versions=">=0.16,<0.17",
            order=1,
            reason="It compares its rank with the flag's list, where -1 would match none.",
        ),
    ),
)


def native_ranks(given: Sequence[int], world_size: int) -> list[int]:
    """The ranks as Megatron-LM reads them.

    Args:
        given: a tuple is the flag's default, a list comes from the command line.
        world_size: number of ranks.
    """
    if isinstance(given, tuple):
        return [0]
    return list(range(world_size)) if -1 in given else list(given)


def wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Translate the ranks for the length of the training loop."""

    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        options = get_args()
        before = options.profile_ranks
        options.profile_ranks = native_ranks(before, options.world_size)
        try:
            return original(*args, **kwargs)
        finally:
            options.profile_ranks = before

    return train
