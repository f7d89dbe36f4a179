"""Optimizers whose masters are packed into the weights, or wait on the host."""
