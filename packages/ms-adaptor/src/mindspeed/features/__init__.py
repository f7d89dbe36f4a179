"""The features of the adaptor: one module each, listed here and nowhere else.

Each listed module defines `FEATURE = Feature(...)` and imports nothing heavy: what a feature does is
named by lazy strings. `load_features()` imports them on first use and checks the whole table.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

from mindspeed.patching.records import Feature

# One dotted module name a line; order is only the order of display.
FEATURE_MODULES: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def load_features() -> tuple[Feature, ...]:
    """Import every listed feature module and return its `FEATURE`."""
    return tuple(importlib.import_module(name).FEATURE for name in FEATURE_MODULES)
