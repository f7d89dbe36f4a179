"""The adaptor itself: the flag that chooses the optimization level."""

from __future__ import annotations

from mindspeed.patching.records import Feature

FEATURE = Feature(
    name="adaptor",
    level=0,
    doc="Chooses how much is optimised; the features of higher levels stay off.",
    when="True",
    page="docs/patching.md",
)
