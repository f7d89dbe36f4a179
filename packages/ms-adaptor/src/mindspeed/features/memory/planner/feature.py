"""One planner behind all flags that give memory a limit: `--memory-budget` and the seed's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed.features.memory.planner.rules import RULES
from mindspeed.features.memory.planner.settings import WANTED, mark
from mindspeed.features.ops.script import before_post_init
from mindspeed.patching.records import Feature, Flag, Patch

_HERE = "mindspeed.features.memory.planner.feature"
# What alone plans nothing, and is refused then.
GIVEN = (
    "memory_actions or memory_pins or adaptive_recompute_device_size != -1"
    " or adaptive_recompute_profiling_step != 10"
)

FEATURE = Feature(
    name="memory.planner",
    level=2,
    when=f"{WANTED} or {GIVEN}",
    doc="A budget of bytes in, the fastest plan of what to keep, recompute or swap out.",
    flags=(
        Flag(
            "--memory-budget",
            type="str",
            help="Memory that a rank may use: bytes (60GiB), a share of the device (0.9), or a"
            " percentage of what the step needs without a plan",
        ),
        Flag(
            "--memory-actions",
            type="str",
            help="What the memory planner may use, with commas: keep, discard, recompute, swap",
        ),
        Flag(
            "--memory-pins",
            type="str",
            help="What the memory planner must do, with commas: layers.0=keep,layers.3*=recompute",
        ),
    ),
    rules=RULES,
    packages=("ms-memory",),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            kind="wrap",
            value=f"{_HERE}:wrap_post_init",
            when=WANTED,
            order=7,
            reason="A schedule sees the configuration of its model alone, and no field of it names"
            " a budget.",
        ),
        Patch(
            target="megatron.core.pipeline_parallel.schedules:get_forward_backward_func",
            kind="wrap",
            value="mindspeed.features.memory.planner.schedule:wrap",
            when=WANTED,
            reason="The first step must be planned when its model, its optimizer and its data are"
            " there, and before it runs; a schedule has no callback at its beginning.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/memory/megatron.md",
)

wrap_post_init = before_post_init(mark)


def advise(config: Any) -> str:
    """Say when a plan pays.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    values: Mapping[str, Any] = vars(config)
    if values.get("recompute_granularity") == "full":
        return "full recomputation leaves memory free: a budget lets layers keep what fits"
    return "pays where a step does not fit; costs one profile, about ten steps of one micro-batch"
