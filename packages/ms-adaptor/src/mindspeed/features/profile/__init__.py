"""Profiling: what ms-profile measures, around the optimizer steps of both training entries."""
