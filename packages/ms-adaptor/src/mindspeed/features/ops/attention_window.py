"""A sliding window by MindSpeed's flags; Megatron's own is `--window-size`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed.features.ops.script import before_post_init
from mindspeed.patching.records import Feature, Patch, Rule

PRE_TOKENS, NEXT_TOKENS = 65536, 0  # The flags' defaults: plain causal attention.
_GIVEN = f"pre_tokens != {PRE_TOKENS} or next_tokens != {NEXT_TOKENS}"

FEATURE = Feature(
    name="ops.attention_window",
    level=1,
    doc="Queries see --pre-tokens keys before their own and --next-tokens after it.",
    rules=(
        Rule(
            kind="forbids",
            left="sparse_mode == 2",
            right=_GIVEN,
            text="--sparse-mode 2 is the plain triangle and reads neither --pre-tokens nor"
            " --next-tokens",
            suggestion="Give --sparse-mode 4 for a band, or leave the tokens out.",
        ),
        Rule(
            kind="requires",
            left="attention_mask_type == 'general'",
            right="create_attention_mask_in_dataloader",
            text="--attention-mask-type general is about the masks that come with the batches, and"
            " the data loader makes none",
            suggestion="Leave --no-create-attention-mask-in-dataloader out.",
        ),
        Rule(
            kind="forbids",
            left="window_size",
            right=f"sparse_mode == 4 or {_GIVEN}",
            text="--window-size is given beside --pre-tokens, --next-tokens or --sparse-mode 4",
            suggestion="Give one of them: they say the same.",
        ),
    ),
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            kind="wrap",
            value="mindspeed.features.ops.attention_window:wrap_post_init",
            order=1,
            reason="The flags become Megatron's window_size where the configuration is made;"
            " no hook lies between the arguments and it.",
        ),
    ),
    advise="mindspeed.features.ops.attention_window:advise",
    page="docs/ops/attention.md",
)


def window(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the window that the flags ask for, None for plain causal attention.

    Args:
        values: arguments by name; absent ones are at their defaults.
    """
    before = values.get("pre_tokens", PRE_TOKENS)
    after = values.get("next_tokens", NEXT_TOKENS)
    given = (before, after) != (PRE_TOKENS, NEXT_TOKENS)
    return (before, after) if given or values.get("sparse_mode") == 4 else None


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Give a configuration of Megatron's the window that the arguments ask for.

    With general masks it also gets the attribute `masks_beside_windows`.
    """
    found = window(values)
    if found is not None:
        config.window_size = found
    if values.get("attention_mask_type") == "general":
        config.masks_beside_windows = True


# Tells each configuration that a script of Megatron-LM makes.
wrap_post_init = before_post_init(mark)


def advise(config: Any) -> str:
    """Say what the window saves for a configuration.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    found = window(vars(config))
    length = getattr(config, "seq_length", None)
    if found is None or not length or found[0] >= length:
        return "the window holds the whole sequence: nothing is saved"
    part = 100 * (found[0] + found[1] + 1) // length
    return f"a query reads {part}% of the keys at most; the model is another one than without"
