"""Matrix products: of groups of rows, and of weight gradients into an accumulator."""

from .accumulate import grouped_matmul_add_, matmul_add_
from .grouped import grouped_matmul

__all__ = ["grouped_matmul", "grouped_matmul_add_", "matmul_add_"]
