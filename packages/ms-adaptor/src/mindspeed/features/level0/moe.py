"""Mixture of experts without TransformerEngine and without the grouped_gemm package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mindspeed.patching.records import Feature, Patch, Rule

if TYPE_CHECKING:
    import torch

_UTILS = "megatron.core.transformer.moe.moe_utils"
_GEMM = "megatron.core.transformer.moe.grouped_gemm_util"
_HERE = "mindspeed.features.level0.moe"
_NO_PACKAGE = f"{_HERE}:grouped_gemm_missing"

FEATURE = Feature(
    name="level0.moe",
    level=0,
    doc="The router and GroupedMLP run without TransformerEngine and grouped_gemm.",
    rules=(
        Rule(
            kind="forbids",
            left="num_experts and device != 'cuda'",
            right="add_bias_linear",
            text="Megatron's own expert MLP adds its bias in place to the output of an autograd "
            "function, which torch refuses in the first forward",
            suggestion="Give --disable-bias-linear.",
        ),
    ),
    patches=(
        Patch(
            target=f"{_UTILS}:te_general_gemm",
            kind="add",
            value=f"{_HERE}:NO_KERNEL",
            probe=f"{_HERE}:name_unbound",
            reason="The router tests this name against None, but without TransformerEngine "
            "it is never bound: NameError in the first forward.",
        ),
        Patch(
            target=f"{_GEMM}:ops",
            kind="set",
            value=f"{_HERE}:LOOP",
            probe=_NO_PACKAGE,
            reason="GroupedMLP calls the grouped_gemm package by this name.",
        ),
        Patch(
            target=f"{_GEMM}:grouped_gemm_is_available",
            kind="replace",
            value=f"{_HERE}:available",
            probe=_NO_PACKAGE,
            reason="GroupedMLP refuses to be built unless this says yes.",
        ),
        Patch(
            target=f"{_GEMM}:assert_grouped_gemm_is_available",
            kind="replace",
            value=f"{_HERE}:assert_available",
            probe=_NO_PACKAGE,
            reason="It asks the package, not the function above.",
        ),
    ),
)

NO_KERNEL = None


class Loop:
    """The ``ops`` of grouped_gemm: one matmul per group."""

    @staticmethod
    def gmm(
        a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False
    ) -> torch.Tensor:
        """Multiply each group of rows of ``a`` by its own matrix.

        Args:
            a: ``[T, K]``, rows sorted by group.
            b: ``[G, K, N]``, or ``[G, N, K]`` with ``trans_b``.
            batch_sizes: ``[G]`` ints on the host: rows of each group, summing to ``T``.
            trans_b: transpose the matrices of ``b``.

        Returns:
            ``[T, N]`` in ``a``'s dtype.
        """
        import torch

        groups = a.split(batch_sizes.tolist())
        weights = b.transpose(1, 2) if trans_b else b
        return torch.cat([rows @ weight for rows, weight in zip(groups, weights, strict=True)])


LOOP = Loop()


def name_unbound(module: Any) -> bool:
    """The router's kernel name does not exist."""
    return not hasattr(module, "te_general_gemm")


def grouped_gemm_missing(module: Any) -> bool:
    """The grouped_gemm package is not installed."""
    return module.grouped_gemm is None


def available() -> bool:
    """Yes: the loop needs no package."""
    return True


def assert_available() -> None:
    """Nothing to assert: the loop needs no package."""
