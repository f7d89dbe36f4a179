"""Matrix products: of groups of rows, of feed-forward layers, and into an accumulator."""

from .accumulate import grouped_matmul_add_, matmul_add_
from .ffn import ffn
from .grouped import grouped_matmul
from .quant import quant_grouped_matmul
from .weight_quant import weight_quant_grouped_matmul

__all__ = [
    "ffn",
    "grouped_matmul",
    "grouped_matmul_add_",
    "matmul_add_",
    "quant_grouped_matmul",
    "weight_quant_grouped_matmul",
]
