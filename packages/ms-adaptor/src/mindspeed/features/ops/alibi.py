"""ALiBi: attention that knows positions by distance alone, in Megatron and its attention flags."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mindspeed.features.ops.script import before_post_init
from mindspeed.patching.records import Choice, Feature, Patch, Rule

_HERE = "mindspeed.features.ops.alibi"
_IS_ALIBI = "position_embedding_type == 'alibi'"


def _alone(names: str, text: str) -> Rule:
    return Rule(
        kind="forbids",
        left=_IS_ALIBI,
        right=names,
        text=f"ALiBi stands for every other notion of position and {text}",
        suggestion="Leave one of the two out.",
    )


FEATURE = Feature(
    name="ops.alibi",
    level=1,
    doc="--position-embedding-type alibi: scores fall with the distance, slopes by head.",
    choices=(Choice("--position-embedding-type", "alibi"),),
    rules=(
        Rule(
            kind="requires",
            left="alibi_fusion_attn_type is not None or alibi_diagonal_opposite"
            " or square_alibi_mask or fill_neg_inf",
            right=_IS_ALIBI,
            text="a flag of ALiBi is given, but the model has other positions",
            suggestion="Give --position-embedding-type alibi, or leave the flag out.",
        ),
        Rule(
            kind="requires",
            left="alibi_diagonal_opposite",
            right="alibi_fusion_attn_type == 0",
            text="--alibi-diagonal-opposite is a form of --alibi-fusion-attn-type 0",
            suggestion="Give that type: 2 and 3 know distances without a sign, and without a type"
            " the bias has its sign anyway.",
        ),
        Rule(
            kind="forbids",
            left="square_alibi_mask",
            right="alibi_fusion_attn_type is not None",
            text="--square-alibi-mask is a form of the bias without --alibi-fusion-attn-type",
            suggestion="Leave one of the two out.",
        ),
        _alone("context_parallel_size > 1 and level < 2", "needs level 2 on a divided sequence"),
        _alone("multi_latent_attention", "multi-latent attention is made of rotary ones"),
        _alone("use_legacy_models", "Megatron's legacy models do not know it"),
    ),
    packages=("ms-ops",),
    patches=(
        Patch(
            target="megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
            kind="wrap",
            value=f"{_HERE}:wrap_post_init",
            reason="The attention modules read the configuration, and no field of it says how"
            " positions enter.",
        ),
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.__init__",
            kind="wrap",
            value=f"{_HERE}:wrap_model",
            reason="A model whose attention knows nothing of ALiBi would train without any"
            " positions; nothing else sees the finished model.",
        ),
    ),
    advise=f"{_HERE}:advise",
    page="docs/ops/attention.md",
)


@dataclass(frozen=True)
class Alibi:
    """What the flags ask for.

    Attributes:
        form: of the bias, with d = j - i: "abs" -slope |d|, "sqrt" -slope sqrt(|d|), "signed"
            slope d.
        fill: minus infinity where d > 0.
    """

    form: Literal["abs", "sqrt", "signed"]
    fill: bool = False


def settings(values: Mapping[str, Any]) -> Alibi | None:
    """Return what the arguments ask for, None for a model with other positions.

    Args:
        values: arguments by name; absent ones are at their defaults.
    """
    if values.get("position_embedding_type") != "alibi":
        return None
    kind = values.get("alibi_fusion_attn_type")
    signed = kind is None or values.get("alibi_diagonal_opposite", False)
    form: Literal["abs", "sqrt", "signed"] = "sqrt" if kind == 3 else "abs"
    return Alibi("signed" if signed else form, bool(values.get("fill_neg_inf", False)))


def mark(config: Any, values: Mapping[str, Any]) -> None:
    """Tell a configuration of Megatron's about ALiBi, where the arguments ask for it.

    Args:
        config: its attribute `alibi` is set.
        values: arguments by name.
    """
    found = settings(values)
    if found is not None:
        config.alibi = found


# Tells each configuration that a script of Megatron-LM makes.
wrap_post_init = before_post_init(mark)


def wrap_model(original: Callable[..., None]) -> Callable[..., None]:
    """Refuse a model that would train without positions.

    Raises:
        ValueError: a core attention does not know the bias.
    """

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.position_embedding_type != "alibi":
            return
        for name, module in self.named_modules():
            if name.endswith("core_attention") and getattr(module, "alibi", None) is None:
                raise ValueError(
                    f"GPTModel: position_embedding_type: got 'alibi' with {name} a"
                    f" {type(module).__name__} that knows no ALiBi, need FusedAttention and a"
                    " configuration with the attribute alibi (mindspeed.features.ops.alibi.mark)"
                )

    return init


def advise(config: Any) -> str:
    """Say what ALiBi does for a configuration.

    Args:
        config: anything with Megatron's argument names as attributes.
    """
    found = settings(vars(config))
    if found is None:
        return "position_embedding_type is not alibi: nothing changes"
    if found.form == "signed":
        return (
            "under a causal mask the same model as types 0 and 2; the slopes cost no memory there"
        )
    return "pays where texts get longer than those trained on; the slopes cost no memory"
