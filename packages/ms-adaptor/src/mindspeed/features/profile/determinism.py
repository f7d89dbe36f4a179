"""`--npu-deterministic`: two runs of one command give the same bits, on every device.

Megatron's own `--deterministic-mode` asks for NCCL_ALGO on every backend; this flag sets what the
device's library needs, and gloo needs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from mindspeed.patching.records import Feature, Patch, Rule

FEATURE = Feature(
    name="determinism",
    level=0,
    doc="Deterministic kernels and collectives: two runs give the same bits.",
    when="npu_deterministic",
    packages=("ms-profile",),
    page="docs/profile/determinism.md",
    rules=(
        # Megatron checks the same for its own flag, when it reads its arguments.
        Rule(
            kind="forbids",
            left="npu_deterministic",
            right="use_flash_attn",
            text="--npu-deterministic and --use-flash-attn: that attention's backward is not"
            " deterministic",
            suggestion="Leave one of them out.",
        ),
        Rule(
            kind="forbids",
            left="npu_deterministic",
            right="cross_entropy_loss_fusion",
            text="--npu-deterministic and --cross-entropy-loss-fusion: the fused cross entropy is"
            " not deterministic",
            suggestion="Leave one of them out.",
        ),
    ),
    patches=(
        Patch(
            target="megatron.training.initialize:_initialize_distributed",
            kind="wrap",
            value="mindspeed.features.profile.determinism:wrap_initialize",
            versions=">=0.16,<0.17",
            reason="Collective libraries read their settings when groups are made; no hook lies"
            " between the arguments and that.",
        ),
    ),
)

# In Megatron-LM the settings hold until the process ends, as its own flag's do.
_held = ExitStack()


def scope(values: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """The context in which a configuration trains; it does nothing without the flag.

    Args:
        values: every option by name.

    Raises:
        RuntimeError: on entering it: process groups exist already.
    """
    if not values.get("npu_deterministic"):
        return nullcontext()
    from ms_profile.determinism import deterministic

    return deterministic()


def wrap_initialize(original: Callable[..., None]) -> Callable[..., None]:
    """Become deterministic before Megatron-LM makes its first group."""

    @functools.wraps(original)
    def initialize_distributed(*args: Any, **kwargs: Any) -> None:
        from megatron.training import get_args

        options = get_args()
        _held.close()
        _held.enter_context(scope(vars(options)))
        # The model's configuration is made from it: indexing in place of scatters.
        options.deterministic_mode = True
        original(*args, **kwargs)

    return initialize_distributed
