"""Matrix products joined with the communication before or after them."""

from .add_norm import matmul_all_reduce_add_rms_norm, matmul_all_reduce_add_rms_norm_
from .experts import alltoall_allgather_bmm, bmm_reducescatter_alltoall
from .grouped import grouped_matmul_all_reduce
from .products import (
    all_gather_matmul,
    all_gather_matmul_reduce_scatter,
    matmul_all_reduce,
    matmul_reduce_scatter,
)

__all__ = [
    "all_gather_matmul",
    "all_gather_matmul_reduce_scatter",
    "alltoall_allgather_bmm",
    "bmm_reducescatter_alltoall",
    "grouped_matmul_all_reduce",
    "matmul_all_reduce",
    "matmul_all_reduce_add_rms_norm",
    "matmul_all_reduce_add_rms_norm_",
    "matmul_reduce_scatter",
]
