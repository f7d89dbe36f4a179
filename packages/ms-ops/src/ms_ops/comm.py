"""Operators that communicate: `ms_ops.comm.matmul_all_reduce(a, b, group)` and its relatives.

Process groups are arguments. Every rank of a group must make the same calls in the same order, with
gradients wanted for the same arguments.
"""

from .fused_comm import (
    all_gather_matmul,
    all_gather_matmul_reduce_scatter,
    alltoall_allgather_bmm,
    bmm_reducescatter_alltoall,
    grouped_matmul_all_reduce,
    matmul_all_reduce,
    matmul_all_reduce_add_rms_norm,
    matmul_all_reduce_add_rms_norm_,
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
