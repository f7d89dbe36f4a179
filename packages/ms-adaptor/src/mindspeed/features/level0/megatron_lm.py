"""Megatron-LM's scripts without nvcc, Triton, TransformerEngine and Apex."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from mindspeed.patching.records import Feature, Patch

_ARGUMENTS = "megatron.training.arguments"
_HERE = "mindspeed.features.level0.megatron_lm"
_BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"

FEATURE = Feature(
    name="level0.megatron_lm",
    level=0,
    doc="pretrain_gpt.py and its siblings start, know our flags and activate our features.",
    patches=(
        Patch(
            target=f"{_ARGUMENTS}:add_megatron_arguments",
            kind="wrap",
            value=f"{_HERE}:wrap_add_arguments",
            versions=">=0.16,<0.17",
            reason="extra_args_provider belongs to the script; ours must not take its place.",
        ),
        Patch(
            target=f"{_ARGUMENTS}:validate_args",
            kind="wrap",
            value=f"{_HERE}:wrap_validate",
            versions=">=0.16,<0.17",
            reason="Features start from the validated arguments; no hook follows validation.",
        ),
        Patch(
            target="megatron.training.yaml_arguments:validate_yaml",
            kind="wrap",
            value=f"{_HERE}:wrap_validate",
            versions=">=0.16,<0.17",
            reason="The same for a YAML configuration.",
        ),
        Patch(
            target="megatron.training.checkpointing:check_checkpoint_args",
            kind="wrap",
            value=f"{_HERE}:wrap_check_checkpoint",
            versions=">=0.16,<0.17",
            reason="It is where a checkpoint's arguments meet the run's; it lets another "
            "padded vocabulary pass, and the loss shifts without a word.",
        ),
        Patch(
            target="megatron.core.datasets.utils:compile_helpers",
            kind="replace",
            value="mindspeed.features.level0.dataset_helpers:compile_helpers",
            reason="It calls make, which builds for the python3 of the PATH and ends the "
            "process when that fails, even where the built module is already there.",
        ),
        Patch(
            target="megatron.legacy.fused_kernels:load",
            kind="replace",
            value=f"{_HERE}:load_no_kernels",
            when="device != 'cuda'",
            versions=">=0.16,<0.17",
            reason="It looks for nvcc before any kernel is asked for.",
        ),
        Patch(
            target=_BATCH_INVARIANT,
            kind="stub_module",
            value=f"{_HERE}:without_triton",
            probe=f"{_HERE}:triton_missing",
            versions=">=0.16,<0.17",
            reason="megatron.training imports it whether or not the mode is used, and it "
            "imports triton unguarded.",
        ),
    ),
)

# What TransformerEngine, Apex or a CUDA build would have to bring; an explicit flag still wins
# and then meets Megatron's own message.
DEFAULTS = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "no_persist_layer_norm": True,
    # Local attention makes the triangle itself, once; a mask in every batch is S^2 bytes of it.
    "create_attention_mask_in_dataloader": False,
}


def wrap_add_arguments(original: Callable[..., ArgumentParser]) -> Callable[..., ArgumentParser]:
    """Add our flags to Megatron's parser and default to what needs no absent package."""

    @functools.wraps(original)
    def add_megatron_arguments(parser: ArgumentParser) -> ArgumentParser:
        from mindspeed.features import add_flags

        parser = original(parser)
        if importlib.util.find_spec("transformer_engine") is None:
            parser.set_defaults(**DEFAULTS)
        add_flags(parser)
        return parser

    return add_megatron_arguments


def wrap_validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Activate the features that the validated arguments ask for."""

    @functools.wraps(original)
    def validate(args: Any, *rest: Any, **defaults: Any) -> Any:
        import mindspeed

        _keep_needed_masks(args)
        result = original(args, *rest, **defaults)
        mindspeed.activate(args if result is None else result)
        return result

    return validate


def _keep_needed_masks(args: Any) -> None:
    """Let the data loader make masks where they say more than the triangle."""
    general = getattr(args, "attention_mask_type", "causal") == "general"
    # On a divided sequence level 2 finds documents in the tokens.
    divided = getattr(args, "context_parallel_size", 1) > 1
    local = getattr(args, "transformer_impl", "local") == "local"
    found = divided and local and getattr(args, "optimization_level", 0) == 2
    if general or (getattr(args, "reset_attention_mask", False) and not found):
        args.create_attention_mask_in_dataloader = True


def wrap_check_checkpoint(original: Callable[..., None]) -> Callable[..., None]:
    """Warn when the checkpoint's vocabulary is padded to another size than this run's."""

    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args: Any) -> None:
        from megatron.training import get_args

        original(checkpoint_args)
        saved = getattr(checkpoint_args, "padded_vocab_size", None)
        now = getattr(get_args(), "padded_vocab_size", None)
        if saved != now:
            warnings.warn(
                f"the checkpoint's vocabulary is padded to {saved} entries and this run's to "
                f"{now}: the loss will differ. Padding depends on the tensor-parallel size; "
                "--make-vocab-size-divisible-by can make the two equal",
                stacklevel=2,
            )

    return check_checkpoint_args


def load_no_kernels(args: Any) -> None:
    """Load nothing: the CUDA kernels have no meaning on this device."""


def triton_missing(module: Any = None) -> bool:
    """Triton is not installed."""
    return importlib.util.find_spec("triton") is None


def without_triton(name: str) -> ModuleType:
    """The module with its mode off; turning it on says what is missing."""
    stub = ModuleType(name, "Batch-invariant kernels without Triton: the mode is always off.")

    def enable_batch_invariant_mode() -> NoReturn:
        raise RuntimeError("--batch-invariant-mode needs Triton: pip install triton")

    def is_batch_invariant_mode_enabled() -> bool:
        return False

    vars(stub).update(
        enable_batch_invariant_mode=enable_batch_invariant_mode,
        is_batch_invariant_mode_enabled=is_batch_invariant_mode_enabled,
    )
    return stub
