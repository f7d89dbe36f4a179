"""Megatron-LM on CPU, Ascend NPU and CUDA, by levels of optimization."""

__version__ = "0.1.0"
