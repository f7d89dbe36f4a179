"""Megatron's torch normalisation refuses sequence parallelism and zero-centred gamma."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch

if TYPE_CHECKING:
    import torch

_TARGET = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"

FEATURE = Feature(
    name="level0.norm",
    level=0,
    doc="LayerNorm and RMSNorm in plain torch for every setting of TransformerConfig.",
    patches=(
        Patch(
            target=_TARGET,
            kind="wrap",
            value="mindspeed.features.level0.norm:wrap_new",
            probe="mindspeed.features.level0.norm:refuses",
            reason="Specs name this class in a dozen builders; none takes another norm class.",
        ),
    ),
)


def refuses(module: Any) -> bool:
    """Whether the class still refuses sequence parallelism, by asking it for such a norm."""
    config = _Settings(normalization="LayerNorm", sequence_parallel=True)
    try:
        module.WrappedTorchNorm(config, 8)
    except AssertionError:
        return True
    return False


def wrap_new(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build :func:`build_norm`'s module; kinds that it does not know go to ``original``."""

    def __new__(
        cls: type,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> Any:
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            return original(cls, config, hidden_size, eps)
        return build_norm(config, hidden_size, eps)

    return __new__


def build_norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
    """A norm over the last dimension, in torch, for any setting of ``TransformerConfig``.

    Args:
        config: reads ``normalization``, ``layernorm_zero_centered_gamma``,
            ``sequence_parallel`` and ``params_dtype``. Persistent and memory-efficient kernels
            do not exist in torch; they change no value, so that these two settings do nothing.
        hidden_size: size of the last dimension of the input.
        eps: added to the variance or mean square.

    Returns:
        ``torch.nn.LayerNorm`` or ``torch.nn.RMSNorm``, or their zero-centred form, whose
        parameters carry ``sequence_parallel`` so that Megatron sums their gradients over the
        tensor-parallel group.
    """
    import torch

    from mindspeed.features.level0 import zero_centered

    rms = config.normalization == "RMSNorm"
    family: Any = zero_centered if config.layernorm_zero_centered_gamma else torch.nn
    kind = family.RMSNorm if rms else family.LayerNorm
    norm: torch.nn.Module = kind(hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class _Settings:
    """The fields of ``TransformerConfig`` that the norm reads, with their defaults."""

    layernorm_zero_centered_gamma = False
    persist_layer_norm = False
    sequence_parallel = False
    memory_efficient_layer_norm = False
    params_dtype = None

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)
