"""Attention over a sequence that the context-parallel ranks share."""
