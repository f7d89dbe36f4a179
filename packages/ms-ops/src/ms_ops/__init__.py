"""Fused transformer operators: one reference, several backends, one test body."""

__version__ = "0.1.0"
