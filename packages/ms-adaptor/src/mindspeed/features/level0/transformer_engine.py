"""Questions about TransformerEngine's version when it is not installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed.patching.records import Feature, Patch

FEATURE = Feature(
    name="level0.transformer_engine",
    level=0,
    doc="An absent TransformerEngine is older than any version asked for.",
    patches=(
        Patch(
            target="megatron.core.utils:is_te_min_version",
            kind="wrap",
            value="mindspeed.features.level0.transformer_engine:wrap_is_te_min_version",
            probe="mindspeed.features.level0.transformer_engine:raises_when_absent",
            reason="It compares None with a version: TypeError in CPU offload and the "
            "precision-aware optimizer.",
        ),
    ),
)


def raises_when_absent(module: Any) -> bool:
    """TransformerEngine is absent and the question raises instead of answering no."""
    try:
        module.is_te_min_version("0.0")
    except TypeError:
        return True
    return False


def wrap_is_te_min_version(original: Callable[..., bool]) -> Callable[..., bool]:
    """Answer no when TransformerEngine is absent."""

    @functools.wraps(original)
    def is_te_min_version(*args: Any, **kwargs: Any) -> bool:
        try:
            return original(*args, **kwargs)
        except TypeError:
            return False

    return is_te_min_version
