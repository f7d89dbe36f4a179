"""FlashAttention's functions on ms_ops.attention, so that its users can run without CUDA.

On the path only of benchmarks of such users, and only where the real package is not installed.
"""

from .flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__version__ = "2.8.3"  # whose signatures these are
__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
