"""The features of the adaptor: one module each, listed here and nowhere else.

Each listed module defines `FEATURE = Feature(...)` and imports nothing heavy: what a feature does
is named by lazy strings. `load_table()` imports them on first use and checks the whole table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from functools import lru_cache

from mindspeed.patching.records import Feature
from mindspeed.patching.table import Table, TableError

# One dotted module name a line; the order is that of `mindspeed features`.
FEATURE_MODULES: tuple[str, ...] = (
    "mindspeed.features.adaptor",
    "mindspeed.features.switches",
    "mindspeed.features.context.adaptive",
    "mindspeed.features.context.algorithm",
    "mindspeed.features.context.documents",
    "mindspeed.features.context.hybrid",
    "mindspeed.features.context.kv_cache",
    "mindspeed.features.context.ring",
    "mindspeed.features.context.ulysses",
    "mindspeed.features.level0.averages",
    "mindspeed.features.level0.collectives",
    "mindspeed.features.level0.cross_entropy",
    "mindspeed.features.level0.cuda_only",
    "mindspeed.features.level0.jit",
    "mindspeed.features.level0.megatron_lm",
    "mindspeed.features.level0.moe",
    "mindspeed.features.level0.norm",
    "mindspeed.features.level0.optimizer",
    "mindspeed.features.level0.pipeline",
    "mindspeed.features.level0.recompute",
    "mindspeed.features.level0.rng",
    "mindspeed.features.level0.transformer_engine",
    "mindspeed.features.memory.conflicts",
    "mindspeed.features.memory.optim.packed",
    "mindspeed.features.memory.optim.streamed",
    "mindspeed.features.memory.planner.feature",
    "mindspeed.features.memory.pools",
    "mindspeed.features.memory.recompute.feature",
    "mindspeed.features.memory.session",
    "mindspeed.features.memory.swap.feature",
    "mindspeed.features.memory.swap.inputs",
    "mindspeed.features.memory.recompute.uniform",
    "mindspeed.features.memory.weights",
    "mindspeed.features.ops.alibi",
    "mindspeed.features.ops.attention",
    "mindspeed.features.ops.attention_window",
    "mindspeed.features.ops.cross_entropy",
    "mindspeed.features.ops.grouped_matmul",
    "mindspeed.features.ops.latent_attention",
    "mindspeed.features.ops.moe_permute",
    "mindspeed.features.ops.optimizer",
    "mindspeed.features.ops.rms_norm",
    "mindspeed.features.ops.rope",
    "mindspeed.features.ops.softmax",
    "mindspeed.features.ops.swiglu",
    "mindspeed.features.ops.weight_gradient",
    "mindspeed.features.profile.determinism",
    "mindspeed.features.profile.flops",
    "mindspeed.features.profile.native",
    "mindspeed.features.profile.steps",
    "mindspeed.features.profile.trace",
)


def load_features() -> tuple[Feature, ...]:
    """Every feature of this project, with the flags that the flag table gives it."""
    return load_table().features


@lru_cache(maxsize=1)
def load_table() -> Table:
    """The checked table of features and flags.

    Raises:
        TableError: a listed module is wrong, or the features contradict each other.
    """
    from mindspeed.features.flags import flag_rows, kept_flags, unserved_flags
    from mindspeed.features.native import native_defaults

    features = []
    for name in FEATURE_MODULES:
        feature = getattr(importlib.import_module(name), "FEATURE", None)
        if not isinstance(feature, Feature):
            raise TableError(f"{name} must define FEATURE = Feature(...)")
        flags = (*feature.flags, *kept_flags(feature.name))
        features.append(dataclasses.replace(feature, flags=flags))
    names = {feature.name for feature in features}
    for row in flag_rows():
        if row.flag.status == "kept" and row.feature not in names:
            raise TableError(f"{row.flag.name} is kept, but there is no feature {row.feature}")
    return Table(tuple(features), unserved_flags(), native_defaults())


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser; see `mindspeed.features.flags.add_flags`."""
    from mindspeed.features.flags import add_flags as add

    return add(parser)
