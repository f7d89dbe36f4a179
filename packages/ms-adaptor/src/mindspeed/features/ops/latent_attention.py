"""Multi-latent attention without TransformerEngine."""

from __future__ import annotations

from typing import Any

from mindspeed.patching.records import Feature, Patch

_HERE = "mindspeed.features.ops.latent_attention"

FEATURE = Feature(
    name="ops.latent_attention",
    level=1,
    doc="Multi-latent attention runs on ms_ops.attention, with heads of two sizes.",
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.transformer.multi_latent_attention:HAVE_TE",
            kind="set",
            value=f"{_HERE}:NO_ENGINE",
            probe=f"{_HERE}:engine_has_no_linear",
            reason="The module takes TransformerEngine for installed as soon as Megatron's own"
            " wrapper imports, and then compares a layer with a class that is None.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/ops/attention.md",
)

NO_ENGINE = False


def engine_has_no_linear(module: Any) -> bool:
    """Whether the module believes in a TransformerEngine that has no linear layer."""
    return bool(module.HAVE_TE) and not isinstance(module.TELinear, type)


def advise(config: Any) -> str:
    """Say what level 1 does for multi-latent attention.

    Args:
        config: anything with Megatron's configuration names as attributes.
    """
    if not getattr(config, "multi_latent_attention", False):
        return "multi_latent_attention is off: nothing changes"
    return "without TransformerEngine only this core attention takes heads of two sizes"
