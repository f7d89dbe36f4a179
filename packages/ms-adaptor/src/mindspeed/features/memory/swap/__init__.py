"""Saved tensors that wait on the host."""
