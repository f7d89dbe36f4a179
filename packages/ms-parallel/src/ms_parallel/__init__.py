"""Parallel training in plain PyTorch, by plans that are data."""

__version__ = "0.1.0"
