"""Virtual pipelines of two stages compute wrong gradients with batched point-to-point messages."""

from __future__ import annotations

from mindspeed.patching.records import Feature, Rule

FEATURE = Feature(
    name="level0.pipeline",
    level=0,
    doc="Refuses a setting that trains on wrong gradients without an error.",
    rules=(
        Rule(
            kind="requires",
            left="virtual_pipeline_model_parallel_size and pipeline_model_parallel_size == 2",
            right="overlap_p2p_comm",
            text="with two pipeline stages, each stage's neighbours on both sides are one rank, "
            "and a virtual pipeline that batches its messages mixes them up",
            suggestion="Use overlap_p2p_comm=True and batch_p2p_comm=False, or more stages.",
        ),
    ),
)
