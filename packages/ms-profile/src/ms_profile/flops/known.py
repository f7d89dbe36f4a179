"""Operators without a formula: which of them do no matrix product, as data.

An operator counts nothing if its namespace never multiplies matrices, if its namespace is one that
we know and its name does not look like a matrix product, or if it is listed here by name. Any
other operator is unknown, and a meter says so.
"""

from __future__ import annotations

import re

# Communication, bookkeeping and random numbers.
NAMESPACES_WITHOUT_PRODUCTS = frozenset(
    {
        "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "debug_mode_ops",
        "debugprims", "prim", "profiler", "rngprims", "symm_mem",
    }
)  # fmt: skip

# Here a name tells whether the operator multiplies matrices.
KNOWN_NAMESPACES = frozenset({"aten", "prims", "npu", "atb", "torchvision", "torchaudio"})

# What names of matrix products contain.
LOOKS_LIKE_PRODUCT = re.compile(
    r"mm|matmul|attention|conv|linear|gemm|einsum|mv|dot|outer|ger$|addr|inner|kron|"
    r"lstm|gru|rnn|cdist|ffn|mla|flash|multi_head|delta_rule|indexer|nsa_|mhc_|rotate_quant"
)

# They look like one and do none (or none that matters: a comparison, a layout, a cell's pointwise
# part).
NO_PRODUCT = frozenset(
    {
        "aten::_convert_indices_from_coo_to_csr", "aten::_convert_indices_from_csr_to_coo",
        "aten::_convert_weight_to_int4pack", "aten::_convert_weight_to_int4pack_for_cpu",
        "aten::_cudnn_rnn_flatten_weight", "aten::_cummax_helper", "aten::_cummin_helper",
        "aten::_foreach_lgamma", "aten::_foreach_lgamma_", "aten::_standard_gamma",
        "aten::_standard_gamma_grad", "aten::_thnn_differentiable_gru_cell_backward",
        "aten::_thnn_differentiable_lstm_cell_backward", "aten::_thnn_fused_gru_cell",
        "aten::_thnn_fused_gru_cell_backward", "aten::_thnn_fused_lstm_cell",
        "aten::_thnn_fused_lstm_cell_backward", "aten::_thnn_fused_lstm_cell_backward_impl",
        "aten::_use_cudnn_rnn_flatten_weight", "aten::cummax", "aten::cummaxmin_backward",
        "aten::cummin", "aten::digamma", "aten::digamma_", "aten::gamma",
        "aten::hamming_window", "aten::igamma", "aten::igamma_", "aten::igammac",
        "aten::igammac_", "aten::lgamma", "aten::lgamma_", "aten::mvlgamma", "aten::mvlgamma_",
        "aten::polygamma", "aten::polygamma_", "aten::special_digamma",
        "aten::special_gammainc", "aten::special_gammaincc", "aten::special_gammaln",
        "aten::special_multigammaln", "aten::special_polygamma",
        "aten::upsample_bilinear2d", "aten::upsample_bilinear2d_backward",
        "aten::upsample_linear1d", "aten::upsample_linear1d_backward",
        "aten::upsample_trilinear3d", "aten::upsample_trilinear3d_backward",
        "aten::__upsample_bilinear", "aten::_upsample_bilinear2d_aa",
        "aten::_upsample_bilinear2d_aa_backward", "aten::mkldnn_reorder_conv2d_weight",
        "aten::mkldnn_reorder_conv3d_weight", "aten::_nested_get_jagged_dummy",
        "npu::npu_gemma_rms_norm", "npu::npu_ring_attention_update", "npu::npu_attention_update",
        "npu::npu_dynamic_quant_asymmetric", "npu::npu_mhc_sinkhorn",
        "npu::npu_mhc_sinkhorn_backward", "npu::_npu_fusion_attention_v3_get_max_workspace",
        "npu::_npu_fusion_attention_v3_infer_output",
        "npu::_npu_fusion_attention_grad_v3_get_max_workspace",
        "npu::_npu_fusion_attention_grad_v3_infer_output",
        "prims::convert_element_type", "prims::conj_physical", "prims::digamma", "prims::lgamma",
        "prims::igamma", "prims::igammac",
    }
)  # fmt: skip


def has_no_product(name: str) -> bool:
    """Whether an operator `namespace::name` is known to multiply no matrices."""
    namespace, _, operator = name.partition("::")
    if namespace in NAMESPACES_WITHOUT_PRODUCTS or name in NO_PRODUCT:
        return True
    return namespace in KNOWN_NAMESPACES and not LOOKS_LIKE_PRODUCT.search(operator)
